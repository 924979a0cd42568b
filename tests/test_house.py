"""The house keeps its order: who may import whom, who may read what, and the README's map of it."""

import ast
import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "mlcd_ds"

FLOORS = {  # DESIGN's table: a file imports from its own floor or below; a folder stands for all of its files
    "__init__": 0,
    "errors": 0,
    "files": 0,
    "partition": 0,
    "batch": 0,
    "config": 0,
    "schedule": 0,
    "ds_keys": 0,
    "ds_rules": 0,
    "ds_config": 0,
    "topology": 1,
    "collectives": 1,
    "feed": 1,
    "watch": 1,
    "losses": 2,
    "sampling": 2,
    "products": 2,
    "sharded_loss": 2,
    "partial_fc": 2,
    "contrastive": 2,
    "optim": 2,
    "averaging": 2,
    "kernels": 2,
    "models": 2,
    "data": 3,
    "checkpoint": 3,
    "universal": 3,
    "monitor": 3,
    "progress": 3,
    "run_folder": 3,
    "engine": 4,
    "contrastive_engine": 4,
    "finetune_engine": 4,
    "card": 4,
    "profiling": 4,
    "memory": 4,
    "step_plan": 4,
    "machine": 4,
    "run_loop": 4,
    "clustering": 4,
    "evaluation": 4,
    "checkpoint_tools": 4,
    "benchmarks": 4,
    "cli": 5,
    "train": 5,
    "soak": 5,
    "finetune": 5,
}

ENVIRONMENT = {  # who may touch os.environ, and which variables (None: any)
    "mlcd_ds/topology.py": None,
    "mlcd_ds/data/tars.py": {"WDS_SECURE"},  # must be set before webdataset is imported: no pipes, no unpickling
}
PROCESS_VARIABLES = {
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
}
UNPICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def sources() -> list[Path]:
    return [*modules(), *sorted((ROOT / "tools").rglob("*.py"))]


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def label(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported(path: Path) -> set[str]:
    """Dotted names of everything `path` imports, anywhere in it; of our own, the module, not the name in it."""
    ours = {dotted(module) for module in modules()}
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{label(path)}:{node.lineno}: relative import; write from mlcd_ds..."
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in ours else node.module)
    return found


def roots(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imported(path)}


def floor_of(module: str) -> int:
    part = module.split(".")[1] if "." in module else "__init__"
    assert part in FLOORS, f"{module} has no floor: enter it in FLOORS here and in the design's table"
    return FLOORS[part]


def calls(path: Path, *names: str):
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in names:
            yield node


def test_imports_go_downward():
    upward = []
    for path in modules():
        for name in imported(path):
            if name.partition(".")[0] == "mlcd_ds" and floor_of(name) > floor_of(dotted(path)):
                upward.append(f"{label(path)} (floor {floor_of(dotted(path))}) imports {name} (floor {floor_of(name)})")
            assert name.partition(".")[0] not in ("tools", "tests"), f"{label(path)} imports {name}"
    assert not upward, upward


def test_imports_have_no_cycle():
    graph = {dotted(path): {n for n in imported(path) if n.startswith("mlcd_ds.")} for path in modules()}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, f"import cycle: {' -> '.join([*trail[trail.index(module) :], module])}"
        if module not in done:
            for other in graph.get(module, ()):
                visit(other, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_deepspeed_is_imported_in_the_engine_alone():
    assert {label(path) for path in sources() if "deepspeed" in roots(path)} <= {"mlcd_ds/engine.py"}


def test_fire_is_imported_by_doors_alone():
    users = {label(path) for path in sources() if "fire" in roots(path)}
    assert all(user == "mlcd_ds/train.py" or user.startswith("tools/") for user in users), users


def test_nothing_needs_torchvision_or_unpickles():
    for path in [*sources(), *sorted((ROOT / "tests").glob("*.py"))]:
        assert "torchvision" not in roots(path), label(path)
    for path in sources():
        assert not roots(path) & UNPICKLERS, label(path)
        for call in calls(path, "torch.load"):
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            assert options.get("weights_only") == "True", f"{label(path)}:{call.lineno}: torch.load(weights_only=True)"
        for call in calls(path, "np.load", "numpy.load"):
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            assert options.get("allow_pickle", "False") == "False", f"{label(path)}:{call.lineno}: allow_pickle"
        for node in ast.walk(tree(path)):
            assert not (isinstance(node, ast.Attribute) and node.attr in ("read_pickle", "to_pickle")), label(path)
            if isinstance(node, (ast.Import, ast.ImportFrom)):  # so that the calls above cannot hide behind a name
                names = {alias.name for alias in node.names}
                assert not (getattr(node, "module", "") in ("torch", "numpy") and "load" in names), label(path)


def test_rank_and_environment_are_read_in_topology_alone():
    for path in sources():
        name = label(path)
        for node in ast.walk(tree(path)):
            place = f"{name}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Constant) and node.value in PROCESS_VARIABLES:
                assert name == "mlcd_ds/topology.py", f"{place}: {node.value} belongs to topology.py"
            if isinstance(node, ast.Attribute) and ast.unparse(node) in ("os.environ", "os.getenv", "os.putenv"):
                assert name in ENVIRONMENT, f"{place}: the environment is read in topology.py"
            if isinstance(node, ast.Attribute) and node.attr in ("get_rank", "get_world_size"):
                assert name in ("mlcd_ds/topology.py", "mlcd_ds/collectives.py"), f"{place}: ask a Topology"
            if isinstance(node, ast.ImportFrom) and node.module == "os":
                assert "environ" not in {alias.name for alias in node.names}, f"{place}: write os.environ"


def test_the_environment_exceptions_touch_only_what_they_may():
    for name, allowed in ENVIRONMENT.items():
        path = ROOT / name
        if allowed is None or not path.exists():
            continue
        for node in ast.walk(tree(path)):
            key = None
            if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "os.environ":
                key = node.slice
            elif isinstance(node, ast.Call) and ast.unparse(node.func).startswith("os.environ."):
                key = node.args[0] if node.args else None
            else:
                continue
            value = key.value if isinstance(key, ast.Constant) else None
            assert value in allowed, f"{name}:{node.lineno} touches {ast.unparse(node)}"


@pytest.mark.parametrize("path", sources(), ids=label)
def test_every_file_says_what_it_is_for(path):
    text = ast.get_docstring(tree(path))
    if path.name == "__init__.py" and not tree(path).body:
        pytest.fail(f"{label(path)} is empty: say in one line what the folder holds")
    assert text and len(text.split()) >= 3, f"{label(path)} has no docstring"


IMPORTER = """
import importlib, json, sys, threading
quiet, loud, report = json.loads(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3]
def state(names):
    for name in names:
        importlib.import_module(name)
    import torch.distributed as dist
    threads = [t.name for t in threading.enumerate() if t is not threading.main_thread()]
    heavy = [name for name in ("deepspeed", "transformers", "faiss", "torchvision", "wandb") if name in sys.modules]
    return {"group": dist.is_initialized(), "threads": threads, "heavy": heavy}
first = state(quiet)
sys.stdout.flush(); sys.stderr.flush()
print("--- loud ---", flush=True); print("--- loud ---", file=sys.stderr, flush=True)
json.dump([first, state(loud)], open(report, "w"))
"""


def test_importing_starts_nothing_and_prints_nothing(tmp_path):
    """One fresh interpreter for all modules; DeepSpeed prints on import, so the modules that need it come last."""
    graph = {dotted(path): imported(path) for path in modules()}

    def needs_deepspeed(module: str) -> bool:
        return any(
            name.partition(".")[0] == "deepspeed" or (name in graph and name != module and needs_deepspeed(name))
            for name in graph[module]
        )

    loud = [module for module in graph if needs_deepspeed(module)]
    quiet = [module for module in graph if module not in loud]
    engines = {"mlcd_ds.engine", "mlcd_ds.contrastive_engine", "mlcd_ds.finetune_engine", "mlcd_ds.run_loop"}
    assert set(loud) <= engines | {"mlcd_ds.train", "mlcd_ds.soak", "mlcd_ds.finetune", "mlcd_ds.benchmarks.step"}, loud
    report = tmp_path / "report.json"
    command = [sys.executable, "-c", IMPORTER, json.dumps(quiet), json.dumps(loud), str(report)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={**_environment()}, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split("--- loud ---")[0] == ""
    assert result.stderr.split("--- loud ---")[0] == ""
    first, second = json.loads(report.read_text())
    assert first == {"group": False, "threads": [], "heavy": []}
    assert (second["group"], second["threads"]) == (False, [])
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"], "importing writes no file"


def _environment() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "PYTHONDONTWRITEBYTECODE": "1"}


# --- the map in the README ---------------------------------------------------------------------------------------

WHOLE_FOLDERS = ("tests/", "docs/", ".ci/")
"""Folders that the map may name as one line, `tests/  # ...`; everywhere else each file has its own line."""


def files_of_the_project() -> set[str]:
    """Tracked files; without git, what lies in the folders of the project. Dot files at the top are left out."""
    if (ROOT / ".git").exists():
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
        names = [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]
    else:
        folders = ("mlcd_ds", "ds_configs", "tools", "tests", "docs", ".ci")
        found = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
        names = [label(path) for path in [*found, *(p for p in ROOT.iterdir() if p.is_file())]]
    return {name for name in names if "__pycache__" not in name and not (name.startswith(".") and "/" not in name)}


def map_in_the_readme() -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.split("\n## Layout\n", 1)
    assert len(section) == 2, 'README.md needs a section "## Layout"'
    block = section[1].split("\n## ", 1)[0].split("```text\n", 1)
    assert len(block) == 2, "the section Layout needs a block ```text: one path per line, `path  # what it is`"
    lines = block[1].split("\n```", 1)[0].splitlines()
    return [line.split("#", 1)[0].strip() for line in lines if line.split("#", 1)[0].strip()]


def test_the_map_in_the_readme_names_exactly_the_files_that_exist():
    paths = map_in_the_readme()
    assert len(paths) == len(set(paths)), "a path stands twice"
    folders = [path for path in paths if path.endswith("/")]
    assert set(folders) <= set(WHOLE_FOLDERS), f"only {WHOLE_FOLDERS} may stand for their files"
    named = {path for path in paths if not path.endswith("/")}
    actual = files_of_the_project()
    for folder in folders:
        assert any(name.startswith(folder) for name in actual), f"{folder} is empty"
    missing = {name for name in actual if name not in named and not name.startswith(tuple(folders))}
    assert not missing, f"not in the README's map: {sorted(missing)}"
    assert not named - actual, f"in the README's map, but not there: {sorted(named - actual)}"


def test_the_tests_that_the_promises_name_exist():
    """docs/reliability.md: `test_file.py::test_name`, and `::test_name` of the file named before."""
    file, named = None, 0
    for name in re.findall(
        r"`((?:test_\w+\.py)?(?:::test_\w+)?)(?:\[[^`]*)?`", (ROOT / "docs/reliability.md").read_text()
    ):
        module, _, test = name.partition("::")
        file = ROOT / "tests" / module if module else file
        if name:
            assert file and file.is_file(), name
            assert not test or f"def {test}(" in file.read_text(), name
            named += bool(test)
    assert named > 10
