"""One reward function per environment; a failed rollout has no reward in any of them."""

from __future__ import annotations

from hpc_gym.training.rewards import environment_reward


def test_each_function_answers_for_its_own_environment() -> None:
    names = ["sudoku", "mail", "sudoku", "mail"]
    rewards = [1.0, 0.25, None, 0.0]
    sudoku, mail = environment_reward("sudoku"), environment_reward("mail")
    assert sudoku(environment_name=names, environment_reward=rewards, prompts=[]) == [1.0, None, None, None]
    # A reward of 0 is a reward; only the failed rollout has none.
    assert mail(environment_name=names, environment_reward=rewards) == [None, 0.25, None, 0.0]
    assert (sudoku.__name__, mail.__name__) == ("sudoku", "mail")
