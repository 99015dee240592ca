"""Composition: who wins over whom, where parents are found, what interpolation and overrides do, and who set what."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from hpc_gym.config.compose import Composed, compose
from hpc_gym.config.document import parse_value, read_document
from hpc_gym.config.problems import problem_line
from hpc_gym.errors import UserError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        path = folder / f"{name.replace('__', '/')}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def refused(*arguments: object, **options: object) -> str:
    with pytest.raises(UserError) as caught:
        compose(*arguments, **options)  # type: ignore[arg-type]
    return str(caught.value)


def vars_of(composed: Composed) -> dict[str, object]:
    found: dict[str, object] = composed.tree["vars"]
    return found


def test_later_parents_win_over_earlier_ones_and_the_file_over_all(folder: Path) -> None:
    write(
        folder,
        a="vars: {x: 1, y: 1, z: 1, only_a: 1}\n",
        b="vars: {y: 2, z: 2, only_b: 2}\n",
        top="extends: [./a.yaml, ./b.yaml]\nvars: {z: 3}\n",
    )
    assert vars_of(compose("top.yaml")) == {"x": 1, "y": 2, "z": 3, "only_a": 1, "only_b": 2}


def test_parents_of_parents_stand_below_them(folder: Path) -> None:
    write(
        folder,
        root="vars: {x: root, y: root}\n",
        a="extends: ./root.yaml\nvars: {x: a}\n",
        b="extends: ./root.yaml\nvars: {b: b}\n",
        top="extends: [a, b]\n",
    )
    # `root` is a parent of both; it does not come again, between a and b, to undo what a said.
    assert vars_of(compose("top.yaml")) == {"x": "a", "y": "root", "b": "b"}


def test_lists_and_values_replace_sections_merge(folder: Path) -> None:
    write(
        folder,
        a="vars: {list: [1, 2, 3], section: {a: 1}, value: 1}\n",
        top="extends: [a]\nvars: {list: [9], section: {b: 2}, value: {deep: 1}}\n",
    )
    assert vars_of(compose("top.yaml")) == {"list": [9], "section": {"a": 1, "b": 2}, "value": {"deep": 1}}


def test_a_circle_of_parents_is_refused_with_the_chain(folder: Path) -> None:
    write(folder, a="extends: [./b.yaml]\n", b="extends: [./c.yaml]\n", c="extends: [./a.yaml]\n")
    assert "a.yaml -> b.yaml -> c.yaml -> a.yaml" in refused("a.yaml")


def test_a_missing_parent_is_refused_with_line_places_and_nearest_names(folder: Path) -> None:
    write(folder, top="name: x\n\nextends:\n  - clusters/local\n  - models/qwen3-4b\n")
    message = refused("top.yaml")
    assert message.startswith("top.yaml:5: extends: 'models/qwen3-4b': not found in ")
    assert str(folder / "configs") not in message  # shown relative to the working directory
    assert "configs" in message
    assert "'models/qwen3-4b-instruct-2507'" in message


def test_a_parent_named_without_its_kind_is_told_the_full_name(folder: Path) -> None:
    write(folder, top="extends: five-node\n")
    assert refused("top.yaml").endswith("did you mean 'experiments/five-node'?")
    write(folder, top="extends: nothing-like-it\n")
    assert "'top'" not in refused("top.yaml")
    assert ": clusters/local, " in refused("top.yaml")


def test_a_folder_is_no_experiment_and_no_parent(folder: Path) -> None:
    write(folder, sub__other="name: x\n", top="extends: ./sub\n")
    assert refused("top.yaml").endswith("there is no file sub. sub is a folder: name a file in it.")
    assert refused("./sub") == "experiment './sub': that is a folder, and an experiment is a YAML file."


def test_a_missing_parent_file_is_refused_with_its_full_name(folder: Path) -> None:
    write(folder, sub__top="extends: [../other.yaml]\n")
    assert refused("sub/top.yaml") == "sub/top.yaml:1: extends: '../other.yaml': there is no file other.yaml."


def test_names_are_found_beside_the_file_then_in_configs_then_among_the_shipped_ones(folder: Path) -> None:
    write(
        folder,
        configs__models__demo="vars: {from: configs}\n",
        project__models__mine="vars: {from: beside}\n",
        project__a="extends: [models/mine]\n",
        project__b="extends: [models/demo]\n",
        project__c="extends: [clusters/local]\n",
    )
    assert vars_of(compose("project/a.yaml"))["from"] == "beside"
    assert vars_of(compose("project/b.yaml"))["from"] == "configs"
    assert compose("project/c.yaml").tree["runtimes"]["device"] == "cpu"


def test_an_experiment_is_a_file_or_a_name_and_a_wrong_name_gets_the_nearest(folder: Path) -> None:
    write(folder, configs__experiments__mine="name: mine\n")
    assert compose("mine").file == (folder / "configs/experiments/mine.yaml").resolve()
    assert "did you mean 'mine'?" in refused("mien")
    assert refused("nothing.yaml") == "experiment 'nothing.yaml': there is no such file."


def test_a_cluster_replaces_the_profiles_that_parents_name_but_not_the_file(folder: Path) -> None:
    write(
        folder,
        configs__clusters__one="vars: {cluster: one, left: over}\n",
        configs__clusters__two="extends: [clusters/site]\nvars: {cluster: two}\n",
        configs__clusters__site="vars: {site: yes it is}\n",
        parent="extends: [clusters/one]\n",
        top="extends: [./parent.yaml, clusters/one]\nvars: {mine: 1}\n",
    )
    assert vars_of(compose("top.yaml", cluster="two")) == {"cluster": "two", "site": "yes it is", "mine": 1}
    assert vars_of(compose("top.yaml")) == {"cluster": "one", "left": "over", "mine": 1}
    assert "--cluster tow: 'clusters/tow': not found" in refused("top.yaml", cluster="tow")


def test_overrides_come_last_and_are_typed_like_yaml(folder: Path) -> None:
    write(folder, top="vars: {a: 1, list: [{x: 1}, {x: 2}]}\n")
    overrides = ["vars.a=2.5e-6", "vars.b.c=[1, two]", "vars.flag=true", "vars.none=", "vars.list.1.x=9", "vars.t=a=b"]
    assert vars_of(compose("top.yaml", overrides)) == {
        "a": 2.5e-6,
        "b": {"c": [1, "two"]},
        "flag": True,
        "none": None,
        "list": [{"x": 1}, {"x": 9}],
        "t": "a=b",
    }


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("vars.a", "must be KEY=VALUE"),
        ("=1", "must be KEY=VALUE"),
        ("vars.list.5=1", "vars.list is a list of 2: name an element by 0 to 1"),
        ("vars.a.b=1", "vars.a is a value (set by top.yaml:1), so nothing is below it"),
        ("vars.a=[", "the value is not YAML"),
        ("extends=[x]", "--cluster NAME"),
    ],
)
def test_an_override_that_fits_nowhere_is_refused(folder: Path, override: str, says: str) -> None:
    write(folder, top="vars: {a: 1, list: [1, 2]}\n")
    message = refused("top.yaml", [override])
    assert message.startswith(f"override '{override}'")
    assert says in message


def test_interpolation_sees_the_composed_values(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    write(
        folder,
        a="vars: {root: /a, data: '${vars.root}/data', from_env: '${oc.env:SCRATCH}/x'}\n",
        top="extends: [a]\nvars: {escaped: '\\${policy_base_url}', section: '${vars.other}', other: {k: 1}}\n",
    )
    assert vars_of(compose("top.yaml", ["vars.root=/b"])) == {
        "root": "/b",
        "data": "/b/data",
        "from_env": "/scratch/me/x",
        "escaped": "${policy_base_url}",
        "section": {"k": 1},
        "other": {"k": 1},
    }


def test_an_interpolation_that_leads_nowhere_is_told_once_with_the_nearest_key(folder: Path) -> None:
    write(
        folder,
        top="vars:\n  data_dir: /d\n  a: ${vars.data_dri}/x\n  b: ${vars.a}/y\n  c: ${oc.env:NOT_SET_ANYWHERE}\n",
    )
    message = refused("top.yaml")
    assert "top.yaml:3: vars.a: '${vars.data_dri}' names no key; did you mean 'vars.data_dir'?" in message
    assert message.count("data_dri") == 1
    write(folder, far="vars: {data_dir: /d, x: '${vars.quite_other}'}\n")
    assert refused("far.yaml").endswith("'${vars.quite_other}' names no key; allowed: vars.data_dir, vars.x.")
    assert "top.yaml:5: vars.c: the environment variable NOT_SET_ANYWHERE is not set" in message


def test_values_left_open_must_be_given(folder: Path) -> None:
    write(folder, top="vars:\n  needed: ???\n")
    assert refused("top.yaml").startswith("top.yaml:2: vars.needed: must be set")
    assert vars_of(compose("top.yaml", ["vars.needed=1"])) == {"needed": 1}


def test_provenance_knows_every_setting_of_a_value(folder: Path) -> None:
    write(folder, a="vars:\n  x: 1\n", top="extends: [./a.yaml]\nseed: 3\nvars:\n\n  x: 2\n")
    provenance = compose("top.yaml", ["vars.x=4"]).provenance
    history = [(setting.value, setting.where) for setting in provenance.history(("vars", "x"))]
    assert history == [(1, "a.yaml:2"), (2, "top.yaml:5"), (4, "override 'vars.x=4'")]
    assert provenance.where(("seed",)) == "top.yaml:2"


def test_provenance_of_a_list_is_that_of_its_last_owner(folder: Path) -> None:
    write(
        folder,
        a="data:\n  train:\n    - {path: old, weight: 1}\n    - {path: older}\n",
        top="extends: [a]\n" + "data:\n  train:\n    - path: new\n",
    )
    provenance = compose("top.yaml").provenance
    assert provenance.where(("data", "train", 0, "path")) == "top.yaml:4"
    assert provenance.history(("data", "train", 0, "weight")) == []
    assert provenance.where(("data", "train", 1, "path")) == "top.yaml:3"  # nothing there any more: the list's line


def test_relative_files_belong_to_the_yaml_that_names_them(folder: Path) -> None:
    write(folder, sub__a="vars: {x: one.txt, y: two.txt}\n", top="extends: [./sub/a.yaml]\nvars: {y: three.txt}\n")
    composed = compose("top.yaml", ["vars.z=four.txt"])
    assert composed.folder_of(("vars", "x")) == folder / "sub"
    assert composed.folder_of(("vars", "y")) == folder
    assert composed.folder_of(("vars", "z")) == Path.cwd()
    assert composed.folder_of(("cluster", "runs_dir")) == Path.cwd()  # set by a file that ships with hpc-gym


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("vars: {a: 1\nb: 2\n", "bad.yaml:2: not YAML"),
        ("- 1\n- 2\n", "bad.yaml:1: the file must hold `key: value` pairs"),
        ("vars:\n  a: 1\n  b: 2\n  a: 3\n", "bad.yaml:4: 'a' is set twice in one section (first on line 2)"),
        ("vars: {1: x}\n", "bad.yaml:1: the key 1 is no text"),
        ("extends: {a: b}\n", "bad.yaml:1: extends: must be a list of names or files"),
        ("vars:\n  ? [a]\n  : 1\n", "bad.yaml:2: a key must be text, not a list or a section"),
        ("seed: 1\nvars: &v {a: [*v]}\n", "bad.yaml:2: the section's anchor (&) is used (*) inside the section itself"),
        ("vars:\n\ta: 1\n", "bad.yaml:2: not YAML: a tab stands here, and YAML indents with blanks only"),
        ("seed: 1\n---\nseed: 2\n", "bad.yaml:2: not YAML: a second document begins here ('---')"),
        ("seed: 1\nvars: !mine {a: 1}\n", "bad.yaml:2: the tag !mine means nothing here: write plain values."),
        ("vars:\n  a: !!python/name:os.system\n", "bad.yaml:2: the tag !!python/name:os.system means nothing here"),
        ("extends: [modles/demo]\n", "bad.yaml:1: extends: 'modles/demo': not found in .,"),
        ("extends: [modles/demo]\n", "did you mean 'models/demo'"),
        ("seed: 1\nvars: {a: '${b'}\n", "bad.yaml:2: vars.a: '${b' is no interpolation: write ${KEY}"),
    ],
)
def test_what_is_no_experiment_file_is_refused_with_its_line(folder: Path, text: str, says: str) -> None:
    (folder / "bad.yaml").write_text(text)
    assert says in refused("bad.yaml")


def test_a_file_that_is_no_text_is_refused(folder: Path) -> None:
    (folder / "bad.yaml").write_bytes(b"seed: 1\nname: \xff\xfe")
    assert refused("bad.yaml") == "bad.yaml:2: not a text file in UTF-8: save it as one."
    (folder / "bad.yaml").write_bytes(b"seed: 1\nname: a\0b")
    assert refused("bad.yaml").startswith("bad.yaml:2: not YAML: unacceptable character #x0000")


def test_numbers_are_read_as_people_write_them(folder: Path) -> None:
    write(folder, top="vars: {a: 1e-5, b: 1.0e-5, c: 2E3, d: 007x, e: 2026-11-20, f: -1e+2, g: 24:00:00, h: 1:30.5}\n")
    tree = read_document(folder / "top.yaml").tree["vars"]
    assert tree == {
        **{"a": 1e-5, "b": 1e-5, "c": 2000.0, "d": "007x", "e": "2026-11-20", "f": -100.0},
        **{"g": "24:00:00", "h": "1:30.5"},
    }
    assert parse_value("1e-5") == 1e-5
    assert parse_value("48:00:00") == "48:00:00"


@pytest.mark.parametrize(
    "text", ["0", "-5", "+5", "1_000", "0x1F", "017", "0b101", "1.5", ".5", "1.", "6.02e+23", ".inf", "-.INF", "12"]
)
def test_other_numbers_are_those_of_yaml(text: str) -> None:
    expected = yaml.safe_load(text)
    assert (parse_value(text), type(parse_value(text))) == (expected, type(expected))


def test_anchors_and_merge_keys_work(folder: Path) -> None:
    write(folder, top="vars:\n  base: &base {a: 1, b: 2}\n  more:\n    <<: *base\n    b: 3\n")
    assert vars_of(compose("top.yaml"))["more"] == {"a": 1, "b": 3}


def test_composing_twice_gives_the_same(folder: Path) -> None:
    write(folder, a="vars: {x: [1, {y: 2}]}\n", top="extends: [a]\n")
    first, second = compose("top.yaml", ["vars.z=1"]), compose("top.yaml", ["vars.z=1"])
    assert first.tree == second.tree
    assert list(first.provenance.settings) == list(second.provenance.settings)


def test_problem_lines_say_where_even_for_what_nothing_set(folder: Path) -> None:
    from hpc_gym.config.problems import Problem

    write(folder, top="vars:\n  a: 1\n")
    provenance = compose("top.yaml").provenance
    assert problem_line(Problem(("vars", "b"), "is missing."), provenance) == "top.yaml:1: vars.b: is missing."


def test_what_nothing_sets_is_missing_in_the_users_file(folder: Path) -> None:
    from hpc_gym.config.validate import validate

    write(folder, top="# nothing yet\n")
    composed = compose("top.yaml", ["name=x"])
    lines = [problem_line(problem, composed.provenance) for problem in validate(composed)[1]]
    assert lines[0].startswith("top.yaml:1: model: is missing: extend models/NAME, or set model.path")
