"""Training with TRL on DeepSpeed: what the ranks of a training node run. `python -m hpc_gym.training.grpo --run-dir
RUN`.
"""
