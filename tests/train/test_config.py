"""--config FILE.yaml: flags written down; anything that is not a plain flag is refused with its line or name."""

import argparse
import re

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from irpe_train.arguments import add_runtime_arguments
from irpe_train.config import ConfigError, as_yaml, parse_args, parse_yaml


def get_parser():
    parser = argparse.ArgumentParser("prog", exit_on_error=False)
    parser.add_argument("--batch-size", default=64, type=int)
    parser.add_argument("--opt-betas", default=None, type=float, nargs="+")
    parser.add_argument("--lr", default=5e-4, type=float)
    parser.add_argument("--drop_block", default=None, type=float)
    parser.add_argument("--load-tar", action="store_true")
    parser.add_argument("--no_aux_loss", dest="aux_loss", action="store_false")
    parser.add_argument("--repeated-aug", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--always", action="store_true", default=True)
    parser.add_argument("--model", default="tiny", choices=("tiny", "base"))
    add_runtime_arguments(parser, seed=0, num_workers=10, amp="none")
    return parser


def parse(tmp_path, text, *argv):
    (tmp_path / "c.yaml").write_text(text)
    return parse_args(get_parser(), ["--config", str(tmp_path / "c.yaml"), *argv])


def test_extra_flags_of_the_environment_win_over_file_and_typed_flags(tmp_path, monkeypatch):
    monkeypatch.setenv("IRPE_EXTRA_FLAGS", "--lr 3 --opt-betas 0.9 0.95")
    args = parse(tmp_path, "lr: 1\nbatch-size: 8\n", "--lr", "2")
    assert (args.batch_size, args.lr, args.opt_betas) == (8, 3.0, [0.9, 0.95])
    monkeypatch.setenv("IRPE_EXTRA_FLAGS", f"--config {tmp_path / 'c.yaml'}")
    assert parse_args(get_parser(), []).batch_size == 8
    other = argparse.ArgumentParser()  # takes no --config, so the variable does not apply
    assert vars(parse_args(other, [])) == {}


def test_extra_flags_with_an_open_quotation_are_one_message(monkeypatch):
    monkeypatch.setenv("IRPE_EXTRA_FLAGS", "--model 'a")
    with pytest.raises(ConfigError, match="IRPE_EXTRA_FLAGS=--model 'a: No closing quotation; write it as in a shell"):
        parse_args(get_parser(), [])


def test_file_becomes_flags_and_typed_flags_win(tmp_path):
    text = "batch-size: 8\nlr: 1e-3   # text to YAML\nopt_betas: [0.9, 0.95]\nmodel: base\n"
    args = parse(tmp_path, text, "--lr", "2")
    assert (args.batch_size, args.lr, args.opt_betas, args.model) == (8, 2.0, [0.9, 0.95], "base")


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("load-tar: true", "load_tar", True),
        ("load_tar: false", "load_tar", False),
        ("no_aux_loss: true", "aux_loss", False),
        ("aux_loss: false", "aux_loss", False),
        ("aux_loss: true", "aux_loss", True),
        ("repeated-aug: false", "repeated_aug", False),
        ("no-repeated-aug: true", "repeated_aug", False),
        ("no-repeated-aug: false", "repeated_aug", True),
        ("tensorboard: false", "tensorboard", False),
        ("no-tensorboard: true", "tensorboard", False),
        ("no-tensorboard: false", "tensorboard", True),
        ("drop_block: null", "drop_block", None),
        ("lr: -1", "lr", -1.0),
        ("output_dir: -x", "output_dir", "-x"),
        ("opt-betas: 0.9", "opt_betas", [0.9]),
    ],
)
def test_values_reach_their_flags(tmp_path, text, name, value):
    assert getattr(parse(tmp_path, text), name) == value


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("batchsize: 8", "unknown name 'batchsize'; did you mean .*batch-size"),
        ("zzzzqqq: 1", "unknown name 'zzzzqqq'; see --help"),
        ("config: other.yaml", "unknown name 'config'"),
        ("help: true", "unknown name 'help'"),
        ("always: false", "always: False: no flag switches this off; leave it out"),
        ("load-tar: 'no'", "load-tar: 'no': this is a switch: expected true or false"),
        ("batch-size: true", "batch-size: True: expected a value"),
        ("batch-size: [1, 2]", "expected one value, got a list"),
        ("batch-size: null", "leave the line out for the default, 64"),
        ("batch-size: {a: 1}", "expected one value or a list, got nested names"),
        ("lr: !!float 3", "line 1: the tag 'tag:yaml.org,2002:float' is refused"),
        ("a: &x 1\nlr: *x", r"line 2: aliases \(\*name\) are refused"),
        ("lr: 1\nlr: 2", "lr appears 2 times"),
        ("- lr", "expected 'name: value' lines, got a list"),
        ("lr: [", "not valid YAML"),
        ("[" * 1100, "line 1: more than 20 nested lists"),
        ("batch-size: 1\nBatch_size: 2", "batch_size appears 2 times; keep one"),
    ],
)
def test_invalid_lines_are_refused(tmp_path, text, words):
    with pytest.raises(ConfigError, match=words):
        parse(tmp_path, text)


def test_yaml_that_would_run_code_is_refused_and_not_run(tmp_path):
    with pytest.raises(ConfigError, match="the tag 'tag:yaml.org,2002:python/object/apply:os.mkdir' is refused"):
        parse(tmp_path, f"lr: !!python/object/apply:os.mkdir ['{tmp_path}/it_ran']")
    assert not (tmp_path / "it_ran").exists()


def test_a_shortened_config_flag_is_not_ignored(tmp_path):
    (tmp_path / "c.yaml").write_text("lr: 3")
    assert parse_args(get_parser(), ["--conf", str(tmp_path / "c.yaml")]).lr == 3
    assert parse_args(get_parser(), [f"--config={tmp_path / 'c.yaml'}"]).lr == 3


def test_the_home_folder_is_found_where_no_shell_has_looked(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "c.yaml").write_text("resume: ~/x.pth")
    args = parse_args(get_parser(), ["--config", "~/c.yaml", "--output_dir=~/out"])
    assert (args.resume, args.output_dir) == (f"{tmp_path}/x.pth", f"{tmp_path}/out")
    assert parse_args(get_parser(), ["--output_dir=~"]).output_dir == str(tmp_path)


def test_a_second_file_is_not_ignored(tmp_path):
    files = [str(tmp_path / f"{name}.yaml") for name in "ab"]
    for flags in (["--config", files[0], "--config", files[1]], [f"--conf={files[0]}", "--lr", "1", "--config", "b"]):
        with pytest.raises(ConfigError, match="--config .*a.yaml --config .*b.*: give one file"):
            parse_args(get_parser(), flags)


def test_missing_file_is_named():
    with pytest.raises(ConfigError, match="--config none.yaml: no file none.yaml in "):
        parse_args(get_parser(), ["--config", "none.yaml"])


@pytest.mark.parametrize(
    "text", ["model: huge", "batch-size: 1.5", "max-bad: 2", "accumulate: 0", "save-interval: often"]
)
def test_argparse_checks_the_file_as_it_checks_typed_flags(tmp_path, text):
    with pytest.raises(argparse.ArgumentError, match=r"invalid|expected"):
        parse(tmp_path, text)


def test_written_config_gives_the_same_flags_again(tmp_path):
    argv = [
        "--lr",
        "1e-7",
        "--opt-betas",
        "0.9",
        "0.99",
        "--no-repeated-aug",
        "--no_aux_loss",
        "--load-tar",
        "--output_dir",
        "a: b # c",
        "--no-tensorboard",
        "--save-interval",
        "10m",
    ]
    args = parse_args(get_parser(), argv)
    (tmp_path / "config.yaml").write_text(as_yaml(get_parser(), args))
    again = parse_args(get_parser(), ["--config", str(tmp_path / "config.yaml")])
    assert vars(again) == vars(args) | {"config": str(tmp_path / "config.yaml")}


def test_the_config_of_a_moved_run_names_the_folder_it_lies_in(tmp_path):
    def output_dir(*argv):
        return parse_args(get_parser(), ["--config", str(tmp_path / "config.yaml"), *argv]).output_dir

    (tmp_path / "config.yaml").write_text("output_dir: outputs/where_it_was\nlr: 1")
    assert output_dir() == "outputs/where_it_was"  # not a run's folder
    (tmp_path / "starts.jsonl").touch()
    assert (output_dir(), output_dir("--output_dir", "new")) == (str(tmp_path), "new")
    (tmp_path / "config.yaml").rename(tmp_path / "mine.yaml")
    assert parse_args(get_parser(), ["--config", str(tmp_path / "mine.yaml")]).output_dir == "outputs/where_it_was"


NAMES = st.sampled_from(["batch-size", "lr", "load-tar", "opt-betas", "model", "aux_loss", "tensorboard", "seed"])
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(),
    st.dates(),
    st.lists(st.one_of(st.integers(), st.text()), max_size=3),
    st.dictionaries(st.text(), st.integers()),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.one_of(st.text(), st.dictionaries(st.one_of(NAMES, st.text()), VALUES).map(yaml.dump)))
def test_any_file_gives_flags_or_one_clear_error(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(text, encoding="utf-8", newline="")
    try:
        args = parse_args(get_parser(), ["--config", str(path)])
    except ConfigError as error:
        assert str(error).startswith(f"--config {path}: ") and len(str(error).splitlines()) == 1
    except argparse.ArgumentError as error:
        assert re.match(r"argument --[\w/ ,-]+: (expected|invalid|not allowed|ignored)", str(error)), error
    except SystemExit as end:  # print_config: true
        assert end.code in (0, None)
    else:
        assert vars(args).keys() == vars(get_parser().parse_args([])).keys()
        assert isinstance(args.batch_size, int) and isinstance(args.lr, float) and args.model in ("tiny", "base")


@pytest.mark.parametrize("text", ["010", "0b1", "0x10", "1_0", "1:30", "+5", "-5", "2024_01", "007", "12:30:45.5"])
def test_a_number_is_read_as_if_it_were_typed(tmp_path, text):
    assert parse(tmp_path, f"output_dir: {text}\n").output_dir == text
    found = []
    for argv in ([f"--batch-size={text}"], []):
        try:
            found.append(parse(tmp_path, "" if argv else f"batch-size: {text}\n", *argv).batch_size)
        except (argparse.ArgumentError, SystemExit) as error:
            found.append(str(error))
    assert found[0] == found[1]


@pytest.mark.parametrize("text", ["1.10", "1.0", "1.", ".5", "1.0e+3", "-2.50", "1e3"])
def test_a_flag_that_is_text_gets_a_number_as_it_was_written(tmp_path, text):
    again = yaml.safe_dump(parse_yaml(f"output_dir: {text}", "x.yaml"))  # as an ablation writes it for each run
    for written in (f"output_dir: {text}\n", again):
        assert parse(tmp_path, written).output_dir == text


@pytest.mark.parametrize("text", ["2026-11-26", "2026-11-26T10:00:00Z", "2026-11-26 10:00:00 +1"])
def test_a_date_is_text(tmp_path, text):
    assert parse(tmp_path, f"output_dir: {text}\n").output_dir == text


def test_print_config_is_a_config_file(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        parse(tmp_path, "batch-size: 8\nrepeated-aug: false\n", "--print-config", "--lr", "0.1")
    assert not end.value.code
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed)["lr"] == 0.1 and "print_config" not in printed
    again = parse(tmp_path, printed)
    assert (again.batch_size, again.lr, again.repeated_aug, again.print_config) == (8, 0.1, False, False)


@pytest.mark.parametrize("text", ["[" * 100_000, "{" * 50_000 + "}" * 50_000, "- " * 50_000, "a: [[[" + "[" * 50_000])
def test_brackets_in_each_other_are_refused_at_once(text):
    """PyYAML takes minutes for them."""
    with pytest.raises(ConfigError, match="x.yaml: line 1: more than 20 nested lists"):
        parse_yaml(text, "x.yaml")
