"""Grid files: their meaning as ``--config`` files, where configs are found; one message for every mistake."""

import contextlib
import itertools

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deit_irpe.args import get_args_parser
from irpe_lab import ablate, jobs
from irpe_lab.grid import expand, read_grid, slug
from irpe_train.config import ROOT, ConfigError, parse_args

GRID = """
package: deit_irpe
config: configs/deit/small.yaml
grid: {rpe: [none, "rpe-1.9-product-{ctx,bias}-1-k"]}
seeds: [0, 1]
published: {rpe-1.9-product-ctx-1-k: deit_small_patch16_224_ctx_product_50_shared_k}
"""


def written(folder, text):
    (folder / "grid.yaml").write_text(text)
    return folder / "grid.yaml"


def parsed(folder, text):
    """The runs by name, each as the flags that training would see."""
    grid = read_grid(written(folder, text))
    return {run: parse_args(get_args_parser(), grid.flags(run)) for run in grid.runs}


def test_braces_multiply():
    assert expand("a-{b,c}-{0,1}") == ["a-b-0", "a-b-1", "a-c-0", "a-c-1"]
    assert expand("none") == ["none"] and expand("") == [""] and expand("x={1}") == ["x={1}"]
    assert slug("a b/c") == "a_b_c"


def test_a_grid_means_what_a_config_means(tmp_path):
    """Each value once in a grid and once in a --config file."""
    values = {
        "repeated-aug": [True, False],
        "no-model-ema": [True, False],
        "no-abs-pos": [True, False],
        "tensorboard": [True, False],
        "clip-grad": [None, 0.5],
        "opt-betas": [None, [0.9, 0.99]],
        "epochs": [3],
        "sched": ["step", "tanh"],
    }
    for key, choices in values.items():
        text = yaml.safe_dump({"package": "deit_irpe", "config": "configs/deit/small.yaml", "grid": {key: choices}})
        runs = parsed(tmp_path, text)
        assert len(runs) == len(choices)
        for value, args in zip(choices, runs.values(), strict=True):
            config = yaml.safe_load((ROOT / "configs/deit/small.yaml").read_text()) | {key: value}
            (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
            alone = parse_args(get_args_parser(), ["--config", str(tmp_path / "c.yaml")])
            assert vars(args) == vars(alone) | {"config": None}, (key, value)


def test_the_nearer_layer_wins_however_it_is_spelled(tmp_path):
    (tmp_path / "base.yaml").write_text("repeated_aug: true\nlr: 1\nepochs: 9\n")
    text = "package: deit_irpe\nconfig: base.yaml\nflags: {no-repeated-aug: true, lr: 2}\nruns:\n  a: {lr: 3}\n"
    args = parsed(tmp_path, text + "  b: {repeated-aug: true}\n")
    assert (args["a"].repeated_aug, args["a"].lr, args["a"].epochs) == (False, 3, 9)
    assert (args["b"].repeated_aug, args["b"].lr) == (True, 2)
    grid = read_grid(tmp_path / "grid.yaml", {"LR": 4})
    assert parse_args(get_args_parser(), grid.flags("a")).lr == 4


def test_where_a_config_is_looked_for(tmp_path, monkeypatch):
    """Beside the grid, then in the working folder, then among the shipped ones."""
    (tmp_path / "grids").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    grid = written(tmp_path / "grids", "package: deit_irpe\nconfig: configs/deit/small.yaml\nruns: {a: {}}\n")
    assert read_grid(grid).runs["a"]["batch-size"] == 128
    for epochs, folder in ((1, "work"), (2, "grids")):
        (tmp_path / folder / "configs/deit").mkdir(parents=True)
        (tmp_path / folder / "configs/deit/small.yaml").write_text(f"epochs: {epochs}\n")
        assert read_grid(grid).runs["a"] == {"epochs": epochs}
    assert list(read_grid("configs/ablation/demo.yaml").runs)[0] == "none"  # a shipped grid, from anywhere
    assert parse_args(get_args_parser(), ["--config", "configs/deit/tiny.yaml"]).config == "configs/deit/tiny.yaml"
    monkeypatch.setenv("HOME", str(tmp_path / "work"))
    grid = written(tmp_path / "grids", "package: deit_irpe\nconfig: ~/configs/deit/small.yaml\nruns: {a: {}}\n")
    assert read_grid(grid).runs["a"] == {"epochs": 1}


def test_runs_are_named_after_their_values(tmp_path):
    more = "repeated-aug: [true, false], lr: [1.0e-3, 1e-3], opt-betas: [[0.90, 0.95]], "
    text = GRID.replace("grid: {", "grid: {" + more)
    text = text.replace("published", "#")
    names = list(read_grid(written(tmp_path, text)).runs)
    assert names[:2] == [
        "repeated-aug=true_lr=0.001_opt-betas=0.9_0.95_none",
        "repeated-aug=true_lr=0.001_opt-betas=0.9_0.95_rpe-1.9-product-ctx-1-k",
    ]
    assert names[3] == "repeated-aug=true_1e-3_opt-betas=0.9_0.95_none"  # which YAML reads as text


@pytest.mark.parametrize(
    "text, message",
    [
        ("package: deit\n", "package: 'deit'; expected one of deit_irpe, detr_irpe"),
        ("package: [deit_irpe]\n", r"package: \['deit_irpe'\]; expected one of"),
        ("pakage: deit_irpe\n", "unknown key pakage; expected package, config"),
        ("- a\n", "expected 'name: value' lines, got a list"),
        ("3\n", "got a int"),
        ("package: [\n", "not valid YAML"),
        ("a: &x [1]\nb: [*x, *x]\n", "aliases"),
        ("grid: {a: 1, a: 2}\n", "a appears 2 times"),
        (GRID + "runs: {1: {epochs: 1}, 1.0: {epochs: 2}}\n", "two names are equal in YAML, .* quote them"),
        (GRID + "runs: {yes: {epochs: 1}, on: {epochs: 2}}\n", "two names are equal in YAML, .* quote them"),
        ("x: " + "1" * 2_000_000, "bytes at most"),
        ("package: deit_irpe\nconfig: nope.yaml\n", "config: no file nope.yaml in .*grid|config: no file nope.yaml"),
        ("package: deit_irpe\nconfig: [" + "1, " * 9999 + "]\nruns: {a: {}}\n", "config: no file .1, 1, 1"),
        ("package: deit_irpe\nconfig: configs\nruns: {a: {}}\n", "config configs: cannot be read: not a file"),
        ("package: deit_irpe\nconfig: configs/deit/small.yaml\n", "neither 'grid' nor 'runs'"),
        (GRID + "runs: {none: {}}\n", "two runs are called none"),
        (GRID + "runs: {NONE: {}}\n", "two runs are called NONE .capitals do not count"),
        (GRID + "evaluations: {at 48: {input-size: 48}, At 48: {input-size: 48}}\n", "At 48: expected a unique name"),
        (GRID + "runs: {//: {}}\n", "a name needs letters or digits"),
        (GRID + "runs: [1, 2]\n", r"runs: expected 'name: value' lines, got \[1, 2\]"),
        (GRID + "runs: {a: 3}\n", "runs: a: expected its flags"),
        (GRID + "runs: {a: {epoch: x}}\n", "run a: epochs: 'x'|run a: .*invalid int value|unknown name 'epoch'"),
        (GRID + "runs: {a: {lr: {b: 1}}}\n", "run a: lr: .*got nested names"),
        (GRID + "runs: {a: {opt-betas: [0.9, --eval]}}\n", "would be read as a flag"),
        (GRID + "runs: {a: {amp: none2}}\n", "run a: argument --amp: invalid choice"),
        (GRID + "runs: {a: {rpe: rpe-1.9-prodct-ctx-1-k}}\n", "run a: rpe spec .*unknown method 'prodct'"),
        ("package: detr_irpe\nruns: {a: {enc_rpe2d: rpe-x}}\n", "run a: rpe spec 'rpe-x': expected six parts"),
        (GRID + "flags: {seed: 3}\n", "seed is set by the runner"),
        (GRID + "flags: {eval: true}\n", "eval is set by the runner"),
        (GRID + "runs: {a: {input-size: 32, Input_Size: 48}}\n", "a: input_size appears 2 times; keep one"),
        (GRID + "flags: [lr]\n", "flags: expected 'name: value' lines"),
        (GRID.replace("none,", "none, none,"), "two runs are called none"),
        ("package: deit_irpe\ngrid: {rpe: []}\n", "grid: rpe: 0 runs"),
        ("package: deit_irpe\ngrid: {rpe: '" + "{a,b}" * 200 + "'}\n", "expected 1 to 10000"),
        ("package: deit_irpe\ngrid: " + str({f"f{i}": list(range(9)) for i in range(30)}), "expected 1 to 10000"),
        (GRID.replace("{rpe-1.9", "{rpe-2.9"), "published: no run is called 'rpe-2.9-product-ctx-1-k'"),
        (GRID.replace("k: deit_small", "k: x"), "published: model zoo: no published checkpoint 'x_patch"),
        (
            GRID.replace("deit_small_patch16_224_ctx_product_50_shared_k", "rpe-1.9-product-ctx-1-k"),
            "published: rpe-1.9-product-ctx-1-k belongs to detr_irpe, not to deit_irpe",
        ),
        (GRID + "baseline: nope\n", "baseline: no run is called 'nope'; the runs are none, rpe"),
        (GRID + "evaluations: {at 48: 48}\n", "evaluations: at 48: expected a unique name and its flags"),
        (GRID + "evaluations: {a b: {}, a_b: {}}\n", "evaluations: a_b: expected a unique name"),
        (GRID + f"evaluations: {{{'x' * 240}: {{}}}}\n", "a file would be called detail_x+...; expected shorter"),
        (GRID + f"runs: {{{'x' * 240}: {{}}}}\n", "a file would be called detail__x+...; expected shorter"),
        (GRID + "evaluations: {a: {seed: 1}}\n", "evaluations: a: seed is set by the runner"),
        (GRID + "evaluations: {a: {input-size: x}}\n", "run none, a: argument --input-size: expected pixels"),
        (GRID.replace("[0, 1]", "[a]"), "seeds: expected whole numbers"),
        (GRID.replace("[0, 1]", "3"), "seeds: expected whole numbers"),
        (GRID.replace("[0, 1]", "[0, 0]"), "seeds: expected different integers"),
        (GRID.replace("[0, 1]", "[0, 1.5]"), "seeds: expected different integers"),
        (GRID.replace("[0, 1]", "[-1]"), "seeds: expected different integers"),
        (GRID.replace("[0, 1]", "{1: 2}"), "seeds: expected whole numbers"),
        (GRID.replace("[0, 1]", f"[{2**64}]"), "seeds: expected different integers"),
        (GRID.replace("[0, 1]", "[]"), "seeds: expected different integers"),
    ],
)
def test_bad_grids(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message) as error:
        read_grid(written(tmp_path, text))
    assert str(error.value).startswith(f"grid {tmp_path / 'grid.yaml'}: ") and len(str(error.value)) < 2000


def test_unreadable_grid_files(tmp_path, monkeypatch):
    for name, reason in (("nowhere.yaml", "no file nowhere.yaml in"), ("/dev/zero", "not a file"), ("", "not a file")):
        with pytest.raises(ConfigError, match=reason):
            read_grid(name)
    (tmp_path / "grid.yaml").write_bytes(b"a: \xff\n")
    with pytest.raises(ConfigError, match="cannot be read .*utf-8"):
        read_grid(tmp_path / "grid.yaml")


def test_only_chooses_runs_and_keeps_the_others_for_the_table(tmp_path):
    grid = written(tmp_path, GRID)
    assert list(read_grid(grid).chosen) == list(read_grid(grid).runs)
    some = read_grid(grid, only="*-ctx-*")
    assert some.chosen == ("rpe-1.9-product-ctx-1-k",) and some.baseline == "none"
    assert (some.runs, some.published) == (read_grid(grid).runs, read_grid(grid).published)
    assert read_grid(grid, only=["none", "*-ctx-*"]).chosen == ("none", "rpe-1.9-product-ctx-1-k")
    with pytest.raises(ConfigError, match="no run name matches x or y; the runs are none, rpe-1.9-product-ctx-1-k"):
        read_grid(grid, only=["x", "y"])


def test_runs_that_would_train_the_same_thing_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="rpe-1.9-product-ctx-1-k: the same flags as none; does --set override"):
        read_grid(written(tmp_path, GRID), {"rpe": "none"})
    assert read_grid(written(tmp_path, GRID), {"rpe": "none"}, only=["none"]).chosen == ("none",)


@pytest.mark.parametrize("name", ["iRPE k", "iRPE_k", "50"])
def test_a_run_is_named_as_written_or_as_its_folder(tmp_path, name):
    text = GRID.replace("published: {rpe-1.9-product-ctx-1-k", f"baseline: {name}\npublished: {{{name}")
    grid = read_grid(written(tmp_path, text + f"runs: {{{name}: {{rpe: rpe-2-product-ctx-1-k}}}}\n"))
    assert [grid.baseline] == list(grid.published) == [name.replace(" ", "_")] and grid.baseline in grid.runs


WORDS = st.sampled_from(
    ["lr", "rpe", "none", "a-{b,c}", "no-abs-pos", "repeated-aug", "x", "configs/deit/tiny.yaml", ""]
)
PLAIN = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), WORDS, st.text(max_size=5), st.dates())
VALUES = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS | PLAIN, inner, max_size=3), max_leaves=8
)
KEYS = ("package", "config", "flags", "grid", "runs", "seeds", "baseline", "published", "evaluations")
GRIDS = st.fixed_dictionaries(
    {"package": st.just("deit_irpe")},
    optional={key: VALUES for key in KEYS[1:]} | {"grid": st.dictionaries(WORDS, VALUES, max_size=3)},
)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.one_of(GRIDS.map(lambda raw: yaml.dump(raw, allow_unicode=True)), st.text(max_size=60), VALUES.map(yaml.dump))
)
def test_any_file_makes_runs_or_one_message(tmp_path_factory, text):
    """Whatever is read makes commands whose flags parse; whatever is refused is refused by name, before any run."""
    folder = tmp_path_factory.mktemp("grid")
    (folder / "grid.yaml").write_text(text, encoding="utf-8", errors="replace", newline="")
    with contextlib.suppress(ConfigError):
        grid = read_grid(folder / "grid.yaml")
        ablation = ablate.Ablation(grid, folder / "out")
        ablation.prepare()
        for (run, seed), run_folder in itertools.islice(ablation.folders.items(), 5):
            command = jobs.in_folder(ablation.commands(seed)[0], run_folder)
            args = parse_args(get_args_parser(), command[command.index("--config") :])
            assert vars(args) == vars(parse_args(get_args_parser(), grid.flags(run))) | {
                "config": args.config,
                "seed": seed,
                "output_dir": args.output_dir,
                "resume": "auto",
            }


def test_seeds_as_text_are_those_of_the_command_line(tmp_path):
    path = tmp_path / "g.yaml"
    path.write_text(GRID.replace("[0, 1]", "'12,3'"))
    assert read_grid(path).seeds == (12, 3)
    with pytest.raises(ConfigError, match="seeds: expected whole numbers"):
        read_grid(path, seeds="")
