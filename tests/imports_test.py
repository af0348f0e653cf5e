"""The direction of imports, and what may not be imported, called or written at all."""

import ast
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "unclip_jax"
SOURCES = sorted(PACKAGE.rglob("*.py"))
CONFIGS = sorted((ROOT / "configs").glob("*.py"))

# A part (module or subpackage of unclip_jax) imports parts of lower layers and, if a subpackage, itself.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors",),
    ("hosts",),
    ("arrays", "sharding", "config", "state", "programs", "flops", "jsonl", "topologies", "compiled_program",
     "provenance"),
    # replicas: one replica's view of a batch; the last two read compiled programs for the planner
    ("replicas", "stopping", "watchdog", "clock", "digests", "serial_storage", "guard", "instruction_costs",
     "tpu_compiler"),
    ("models", "diffusion", "data", "optim", "sharpness", "checkpoint", "metrics", "goodput", "roofline"),
    ("stages", "evaluation", "interop"),
    # parts: trained networks, read from their workdirs; importing: makes others' such workdirs; pages: HTML
    ("inception_file", "parts", "importing", "captioned_grid", "description", "goodput_sums", "pages",
     "picture_files"),
    # predictor: calls parts; jobs: runs programs side by side
    ("predictor", "quickstart_report", "run_curves", "jobs", "evaluation_pages"),
    ("unclip", "training_jobs", "run_report"),
    ("program", "fitting", "report", "feature_networks", "reference_filter", "evaluation_exchange",
     "manipulation", "probing"),
    # inputs: what a program reads; beginnings: weights that it begins with; traced_run: a run traced, for the planner;
    # plans: what it says
    ("inputs", "beginnings", "traced_run", "plans", "evaluated_models"),
    ("train", "planning", "image_units", "artifacts"),
    ("plan_search", "plan_tables", "evaluation_job", "serving"),  # serving: the server of an export
    ("plan", "embed", "evaluate", "generate", "statistics", "manipulate", "convert", "export", "prepare",
     "human_study", "preferences", "probe", "serve"),
    ("quickstart_results", "ablation_tables"),
    ("quickstart", "ablation_cells"),  # quickstart: runs the others
    ("ablations", "reproduction"),  # ablations: so does this
    ("reproduce",),
)
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}

# Parts that may not use everything beneath them. A stage is pure functions; the data it is fed is not its business.
ONLY = {
    "stages": {"errors", "arrays", "sharding", "replicas", "models", "diffusion"},
    "models": {"errors", "arrays", "sharding"},
    "diffusion": {"errors", "arrays"},
    "data": {"errors", "arrays"},
}

# What runs or unpacks what a file says, or can. Word boundaries keep `retrieval(` and `.eval_split` out.
FORBIDDEN = re.compile(
    r"\bpickle\b|\bdill\b|torch\.load|allow_pickle|yaml\.(unsafe_)?load\b|\.extract(all)?\(|(?<![\w.])(eval|exec)\(|"
    r"os\.system|shell=True|mktemp\("
)
# interop/torch_files.py reads pickles of tensors through a reader of its own, which runs nothing that they name.
PICKLES = re.compile(r"\bpickle\b")
READS_PICKLES = "unclip_jax/interop/torch_files.py"
# config.py runs the config file that the user names: a config is a program by design, and is loaded there only.
# stages/base.py imports the stage that a config names, out of its own table of module names.
RUNS_FILES = re.compile(r"exec_module|spec_from_file_location|runpy|import_module")
MAY_RUN_FILES = {"unclip_jax/config.py", "unclip_jax/stages/base.py"}

MOST_LINES = 400
VAGUE = {"utils", "util", "core", "task", "helpers", "misc", "common", "experiment", "base_utils"}


def relative(path: pathlib.Path) -> str:
    return path.relative_to(ROOT).as_posix()


def part_of(path: pathlib.Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(path: pathlib.Path) -> set[str]:
    """Absolute names of all that a file imports, functions' late imports included; `from a import b` is `a.b`."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{relative(path)}:{node.lineno}: relative import; write it from unclip_jax on"
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def test_every_part_has_a_layer():
    parts = {part_of(path) for path in SOURCES} - {"__init__"}
    assert parts <= set(LEVEL), "give each new part its place in LAYERS"


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_imports_point_downward(path):
    here = part_of(path)
    used = {name.split(".")[1] for name in imported(path) if name.startswith("unclip_jax.")} - {here, "__version__"}
    upward = {part for part in used if LEVEL[part] >= LEVEL.get(here, -1)}
    assert not upward, f"{here} is beneath or beside {sorted(upward)}"
    assert used <= ONLY.get(here, used), f"{here} may use only {sorted(ONLY[here])}"


@pytest.mark.parametrize("path", SOURCES + CONFIGS, ids=relative)
def test_nothing_imports_tests_or_configs(path):
    roots = {name.split(".")[0] for name in imported(path)}
    allowed = {"configs"} if path in CONFIGS else set()
    assert not roots & {"tests", "configs", "conftest"} - allowed


@pytest.mark.parametrize("path", CONFIGS, ids=relative)
def test_configs_build_nothing(path):
    names = imported(path)
    assert not {name for name in names if name.startswith("configs") and name != "configs.common"}
    roots = {name.split(".")[0] for name in names} - {"configs", "ml_collections"}
    assert roots <= sys.stdlib_module_names


@pytest.mark.parametrize("path", SOURCES + CONFIGS, ids=relative)
def test_no_file_runs_or_unpacks_what_it_reads(path):
    for number, line in enumerate(path.read_text().splitlines(), 1):
        code = line.partition("#")[0]
        held = PICKLES.sub("", code) if relative(path) == READS_PICKLES else code
        assert not FORBIDDEN.search(held), f"{relative(path)}:{number}: {line.strip()}"
        if relative(path) not in MAY_RUN_FILES:
            assert not RUNS_FILES.search(code), f"{relative(path)}:{number}: {line.strip()}"


def test_files_are_short_and_named_for_what_they_hold():
    lines = {relative(path): path.read_text().count("\n") for path in SOURCES + CONFIGS}
    long = {name: count for name, count in lines.items() if count > MOST_LINES}
    assert not long, "split by noun"
    vague = {relative(path) for path in SOURCES if {path.stem, path.parent.name} & VAGUE}
    assert not vague


def test_only_layers_names_logical_axes():
    """The names of weights' axes stand in one file: the table of the config is written against it."""
    writers = {relative(path) for path in SOURCES if "_partitioning(" in path.read_text()}
    assert writers == {"unclip_jax/models/layers.py"}


def run(program: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_importing_the_package_imports_nothing_else():
    program = "import sys; old = set(sys.modules); import unclip_jax; print(*sorted(set(sys.modules) - old))"
    assert run(program).split() == ["unclip_jax"]


# A config as small as it can be; the path from the records to the new weights is that of any run.
STEP = """
import sys
import jax
from unclip_jax import config, sharding, train

loaded = config.load("configs/clip.py:tiny", {
    "batch_size": 4, "data.data_dir": sys.argv[1], "data.variant": "smoke", "model.image_size": 16,
    "model.vision_width": 8, "model.vision_depth": 1, "model.vision_heads": 1,
    "model.text_width": 8, "model.text_depth": 1, "model.text_heads": 1, "model.embed_dim": 8})
program = train.build(loaded, sharding.make_mesh(loaded.mesh))
batches = train.Input(program).training(0)
state = program.init(jax.random.key(0))
state, report = program.train_step(state, {}, sharding.put_batch(next(batches), program.batch_sharding))
assert int(state.step) == 1 and float(report["loss"]) > 0
batches.close()
print(*sorted(name for name in ("jax", "tensorflow", "torch") if name in sys.modules))
"""


def test_a_training_worker_imports_neither_tensorflow_nor_torch(data_dir):
    assert run(STEP, data_dir).split() == ["jax"]
