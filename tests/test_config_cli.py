"""From the command line to settings: nothing is lost, guessed or taken for something else."""

import ast
import subprocess
import sys
from pathlib import Path

import fire
import pytest

from mlcd_ds import cli, config
from mlcd_ds.config import ProbeConfig, RunConfig, Settings
from mlcd_ds.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
REQUIRED = ["--deepspeed_config", "x.json", "--shards", "a.tar", "--labels", "labels", "--output_dir", "run"]


def parse(*argv: str) -> RunConfig:
    """argv through the strict parser and python-fire, as a door does it."""
    seen = []
    flags = cli.parse_flags([*REQUIRED, *argv], RunConfig)
    command = [f"--{name}={value!r}" for name, value in flags.items()]
    fire.Fire(cli.door(seen.append, RunConfig), command=command, serialize=lambda _: None)
    return seen[0]


@pytest.mark.parametrize(
    ("argv", "flip"),
    [
        ([], True),
        (["--flip=false"], False),
        (["--flip=False"], False),
        (["--flip", "false"], False),
        (["--flip", "0"], False),
        (["--flip", "off"], False),
        (["--noflip"], False),
        (["--flip"], True),
        (["--flip", "--seed", "3"], True),
        (["--noflip", "--seed=3"], False),
        (["--flip=yes"], True),
    ],
)
def test_false_means_false(argv, flip):
    assert parse(*argv).flip is flip


@pytest.mark.parametrize(
    "text",
    [
        "a#b",
        "1e3",
        "007",
        "-",
        "true",
        "None",
        "help",
        "[1,2]",
        "{'a': 1}",
        "{00000..00012}.tar::x/{a,b}*.tar",
        'it\'s "quoted", with a comma',
        "back\\slash\\n",
        "s3://bucket/a=b&c?d",
        "ünïcode 文",
        "  spaces  ",
        "a\nb",
        "lambda: 0",
        "--=x",
    ],
)
def test_values_arrive_as_they_were_typed(text):
    config = parse(f"--init_from={text}")
    assert config.init_from == (None if text == "None" else text)  # init_from may be None, and says so
    assert cli.build(RunConfig, {**cli.parse_flags([*REQUIRED], RunConfig), "labels": text}).labels == text


def test_numbers():
    assert parse("--samples", "12.8e9").samples == 12_800_000_000
    assert parse("--steps=1e3").steps == 1000
    assert parse("--scale", "3e1").scale == 30.0
    assert parse("--negative_filter", "-0.5").negative_filter == -0.5
    assert parse("--epochs", "0.5").epochs == 0.5
    for wrong in ("1.5", "1e-3", "many", "nan", "inf", "0"):
        with pytest.raises(ConfigError, match="--steps"):
            parse("--steps", wrong)
    for wrong in ("nan", "inf", "1e999"):
        with pytest.raises(ConfigError, match="--epochs .*finite"):
            parse("--epochs", wrong)


def test_labels_centers_and_weights_of_several_heads():
    def several(**more):
        flags = cli.parse_flags([*REQUIRED], RunConfig) | {"labels": "image:: text"} | more
        return cli.build(RunConfig, flags)

    assert config.split_paths(several().labels) == ("image", "text") and several().head_weights is None
    assert several(head_weights="1, 0.5").head_weights == (1.0, 0.5)
    assert several(centers="a::b.npy", head_weights="none").centers == "a::b.npy"
    for wrong, message in (
        ({"head_weights": "1"}, "--head_weights names 1 weights, --labels 2 folders"),
        ({"centers": "a"}, "--centers 'a' names 1 centers, --labels 2 folders"),
        ({"centers": "a::"}, "--centers 'a::' names 1 centers, --labels 2 folders"),
        ({"labels": "image::"}, "--labels 'image::' names an empty folder"),
    ):
        with pytest.raises(ConfigError) as caught:
            several(**wrong)
        assert message in str(caught.value)


@pytest.mark.parametrize(
    "argv",
    [
        ["--shards=a.tar", "--shards=b.tar", "--seed=3"],
        ["--shards", "a.tar", "b.tar", "--seed", "3"],
        ["--seed=3", "--shards", "a.tar", "--shards", "b.tar"],
    ],
)
def test_a_pattern_that_a_shell_of_another_host_has_expanded_is_joined_again(argv):
    """With a launcher; without one the user's own shell has done it, which is a mistake to be told."""
    assert cli.parse_flags(["--local_rank=0", *argv], RunConfig) == {"shards": "a.tar::b.tar", "seed": "3"}
    with pytest.raises(ConfigError, match="unexpected argument 'b.tar'|--shards is given twice"):
        cli.parse_flags(argv, RunConfig)
    with pytest.raises(ConfigError, match="--shards needs a value"):
        cli.parse_flags(["--local_rank=0", "--shards"], RunConfig)
    with pytest.raises(ConfigError, match="--seed is given twice"):
        cli.parse_flags(["--local_rank=0", *argv, "--seed=4"], RunConfig)


def test_none_is_none_only_where_it_may_be():
    assert parse("--centers", "none").centers is None
    assert parse("--margin_type", "none").margin_type == "none"
    assert parse("--head_weight_decay=None").head_weight_decay is None
    with pytest.raises(ConfigError, match="--seed 'none'"):
        parse("--seed", "none")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--margn", "0.3"], "unknown flag --margn. Did you mean --margin?"),
        (["--train_data", "x"], "Did you mean --shards?"),
        (["--sample-rat=0.1"], "Did you mean --sample_rate?"),
        (["--zzzz", "1"], "unknown flag --zzzz. (--help"),
        (["--noseed"], "unknown flag --noseed. Did you mean --seed?"),
        (["loose"], "unexpected argument 'loose'"),
        (["--", "--trace"], "unexpected argument '--'"),
        (["--dry_run", "maybe"], "unexpected argument 'maybe'"),
        (["--seed"], "--seed needs a value"),
        (["--seed", "--dry_run"], "--seed needs a value"),
        (["--seed="], "--seed has an empty value"),
        (["--seed", "1", "--seed", "2"], "--seed is given twice ('1' and '2')"),
        (["--seed", "-1"], "--seed '-1'"),
        (["--objective", "mlc2"], "--objective 'mlc2': Input should be 'mlcd', 'mlc', 'cd' or 'clip'"),
        (["--flip=maybe"], "--flip 'maybe'"),
        (["--epochs", "1", "--steps", "2"], "--epochs and --steps all say how long"),
        (["--positives_drawn", "9"], "--positives_drawn 9 is more than the --num_positives 8 to draw from"),
        (["--positives_drawn", "0"], "--positives_drawn '0'"),
        (["--head_weights", "1,0.5"], "--head_weights names 2 weights, --labels 1 folders"),
        (
            ["--head_weights", "1,0"],
            "--head_weights '1,0': must be finite numbers above 0, separated by commas, like 1,0.5",
        ),
        (["--head_weights", "inf"], "--head_weights 'inf': must be finite"),
        (["--head_weights", "1,x"], "--head_weights '1,x': must be finite"),
        (["--centers", "A::B"], "--centers 'A::B' names 2 centers, --labels 1 folders"),
        (["--world_size", "8"], "--world_size only means something with --dry_run"),
        (["--objective", "clip"], "has no class head: --labels would do nothing"),
        (["--lock_image"], "--lock_image is for --objective clip"),
        (["--batch_size", "8"], "'train_batch_size'"),
        (["--lr=1e-3"], "'optimizer.params.lr'"),
        (["--precision", "bf16"], "'bf16.enabled'"),
        (["--grad-clip-norm", "1"], "'gradient_clipping'"),
    ],
)
def test_wrong_flags_end_in_one_message_with_the_cure(argv, message):
    with pytest.raises(ConfigError) as caught:
        cli.build(RunConfig, cli.parse_flags([*REQUIRED, *argv], RunConfig))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_deepspeed_owns_names_the_json_only_for_commands_that_have_one():
    with pytest.raises(ConfigError, match="unknown flag --lr"):
        cli.parse_flags(["--lr", "1"], ProbeConfig)
    assert cli.parse_flags(["--batch_size", "1"], ProbeConfig) == {"batch_size": "1"}
    for name, key in cli.DEEPSPEED_OWNS.items():
        assert name not in RunConfig.model_fields
        with pytest.raises(ConfigError, match=key):
            cli.parse_flags([f"--{name}=1"], RunConfig)


def test_missing_flags_are_named_with_their_meaning():
    with pytest.raises(ConfigError) as caught:
        cli.build(RunConfig, {"shards": "a.tar"})
    for name in ("deepspeed_config", "labels", "output_dir"):
        assert f"--{name} is required: {RunConfig.model_fields[name].description}" in str(caught.value)


def test_launchers_may_add_local_rank_and_dashes_are_underscores():
    for extra in (["--local_rank=0"], ["--local_rank", "3"], ["--local-rank=1"]):
        assert parse(*extra, "--seed", "5").seed == 5
    assert parse("--sample-rate", "0.5").sample_rate == 0.5


def test_letters_that_the_help_shows_work_and_others_are_refused():
    assert parse("-g", "float32").gather_precision == "float32"
    assert parse("-g=float32").gather_precision == "float32"
    with pytest.raises(ConfigError, match="unexpected argument '-s'"):  # --seed, --shards, --steps...
        parse("-s", "7")


def door_script(tmp_path: Path) -> Path:
    script = tmp_path / "door.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport fire\nfrom mlcd_ds import cli\n"
        "from mlcd_ds.config import ProbeConfig\nfrom mlcd_ds.errors import DataError\n"
        'def probe(config: ProbeConfig) -> None:\n    """Fits a probe."""\n'
        "    if config.model == 'bad':\n        raise DataError('x.tar is cut at byte 5')\n"
        "    print(config.model, config.seed)\n    return {'fire': 'prints nothing'}\n"
        "cli.run(fire.Fire, probe, ProbeConfig)\n"
    )
    return script


def test_a_door_as_a_process(tmp_path):
    script = door_script(tmp_path)

    def call(*argv):
        return subprocess.run([sys.executable, script, *argv], capture_output=True, text=True, timeout=60)

    shards = ["--train_shards=a", "--test_shards=b"]
    good = call("--local_rank=0", "--model", "run:a#b,{c}", *shards, "--seed", "1e3")
    assert (good.returncode, good.stdout, good.stderr) == (0, "run:a#b,{c} 1000\n", "")

    bad = call("--model=bad", *shards)
    assert (bad.returncode, bad.stdout, bad.stderr) == (3, "", "error: x.tar is cut at byte 5\n")

    unknown = call("--modl=bad", *shards)
    assert unknown.returncode == 2
    assert unknown.stderr == "error: unknown flag --modl. Did you mean --model? (--help lists all flags)\n"

    page = call("--help")
    text = " ".join((page.stdout + page.stderr).split())
    assert page.returncode == 0
    assert "Fits a probe." in text
    for name, field in ProbeConfig.model_fields.items():
        assert f"--{name}=" in text
        if field.description:
            assert " ".join(field.description.split()) in text, name


# --- every setting is read ---------------------------------------------------------------------------------------


def settings_classes() -> list[type[Settings]]:
    return [
        value
        for value in vars(config).values()
        if isinstance(value, type) and issubclass(value, Settings) and value is not Settings
    ]


def fields_read(tree: ast.AST) -> set[str]:
    """Attributes read from what is called config, settings, defaults, or annotated with a settings class; and the names
    over which a caller does `getattr(config, name)`: those in a tuple SETTINGS, or the `model_fields` of a class.
    """
    names = {cls.__name__ for cls in settings_classes()}
    holders = {
        argument.arg
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for argument in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        if argument.annotation is not None and names & set(ast.unparse(argument.annotation).replace("|", " ").split())
    }
    read = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            holder = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
            if holder in holders or holder.lstrip("_") in ("config", "settings", "defaults"):
                read.add(node.attr)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if node.value is not None and any(getattr(target, "id", "") == "SETTINGS" for target in targets):
                read |= {part.value for part in ast.walk(node.value) if isinstance(part, ast.Constant)}
        elif isinstance(node, ast.DictComp) and "getattr(config, " in ast.unparse(node.value):
            over, _, fields = ast.unparse(node.generators[0].iter).partition(".")
            read |= set(getattr(config, over).model_fields) if over in names and fields == "model_fields" else set()
    return read


def test_every_field_of_every_settings_class_is_read_somewhere():
    sources = {
        path: path.read_text()
        for folder in ("mlcd_ds", "tools")
        for path in (ROOT / folder).rglob("*.py")
        if path.name not in ("config.py", "cli.py")
    }
    read = {path: fields_read(ast.parse(text)) for path, text in sources.items()}
    unread = []
    for cls in settings_classes():
        family = {other.__name__ for other in settings_classes() if issubclass(other, cls) or issubclass(cls, other)}
        files = [path for path, text in sources.items() if any(name in text for name in family)]
        for name in cls.model_fields:
            if not any(name in read[path] for path in files):
                unread.append(f"{cls.__name__}.{name}")
    assert not unread, f"parsed but never read (in a file that names the class): {unread}"


def test_defaults_are_valid_and_settings_are_frozen():
    run = RunConfig(deepspeed_config="x", shards="x", labels="x", output_dir="x")
    with pytest.raises(Exception, match="frozen"):
        run.seed = 3
    for cls in settings_classes():
        needed = {name: field.annotation for name, field in cls.model_fields.items() if field.is_required()}
        required = {name: 1 if kind is int else "x" for name, kind in needed.items()}
        required |= {"labels": "x"} if cls is RunConfig else {}  # by the default objective, not by itself
        values = cls(**required)
        assert cls.model_validate(values.model_dump()) == values
        with pytest.raises(Exception, match="Extra inputs"):
            cls(**required, no_such_setting=1)


def test_only_steps_that_are_saved_can_be_kept():
    assert parse("--keep_every", "3000", "--save_every_steps", "1000").keep_every == 3000
    with pytest.raises(ConfigError, match="--keep_every 1500 is no multiple of --save_every_steps 1000"):
        parse("--keep_every", "1500")


def test_captions_need_a_tokenizer_and_no_labels():
    base = {"deepspeed_config": "x.json", "shards": "a.tar", "output_dir": "run", "objective": "clip"}
    run = cli.build(RunConfig, base | {"tokenizer": "t.json"})
    assert run.on_captions and run.labels_folders == () and run.text_model == "text_b"
    for more, message in (
        ({}, "needs --tokenizer: a tokenizer.json or .* tools/train_tokenizer.py"),
        ({"tokenizer": "t", "labels": "l", "scale": "32"}, "no class head: --labels, --scale would do nothing"),
        ({"tokenizer": "t", "lock_image": "true"}, "--lock_image keeps the image tower of --init_from: name"),
    ):
        with pytest.raises(ConfigError, match=message):
            cli.build(RunConfig, base | more)
