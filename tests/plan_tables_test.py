"""What is printed of a plan: nothing that a reader needs is left out, and the page's table holds what was kept."""

import dataclasses
import io
import json

import pytest
from benchmarks import pod_plans
from rich.console import Console

from unclip_jax import plan_tables
from unclip_jax.planning import short_path
from unclip_jax.plans import Plan

PLAN = Plan(
    stage="decoder",
    program="train",
    topology="v5p-512",
    chips=256,
    chip="v5p",
    mesh={"slice": 1, "data": 4, "fsdp": 64, "model": 1},
    batch_size=2048,
    batch_per_chip=8.0,
    accumulation=2,
    remat={"model.unet.remat": "full", "clip.remat": "none"},
    compiled=True,
    effort="quick",
    fits=True,
    headroom=0.25,
    fits_with_headroom=True,
    bytes_per_chip=75 * 2**30,
    hbm_per_chip=100 * 2**30,
    memory={"arguments": 5 * 2**30, "temporaries": 69 * 2**30, "outputs": 0, "code": 2**30},
    model_flops=13.6e15,
    executed_flops=18.1e15,
    mxu_padding=0.125,
    assumptions=["v5p: 459 TFLOP/s"],
    trace_seconds=30.0,
    compile_seconds=600.0,
    host_peak_bytes=12 * 2**30,
    compiled_flops=18.0e15,
    largest_buffers=[{"bytes": 2**31, "shape": "bf16[8,64,64,512]", "op_name": "jit(f)/up_0/mul", "kind": "temporary"}],
    collectives={"all-to-all": {"count": 3, "bytes": 3e6, "sent": 2e6}},
    exchanged=[{"kind": "all-to-all", "serves": "up_0/conv", "count": 3, "bytes": 3e6, "sent": 2e6, "among": 64}],
    roofline={
        "compute_seconds": 0.15, "hbm_seconds": 0.1, "memory_bound_seconds": 0.02, "ici_seconds": 0.03,
        "dcn_seconds": 0.0, "exposed_seconds": 0.03, "step_seconds": 0.2, "overlapped_seconds": 0.15, "flops": 7e13,
        "hbm_bytes": 3e11,
        "hot": [{"seconds": 0.01, "times": 3, "bound": "HBM", "op_name": "jit(f)/jvp(up_0)/mul", "name": "fusion.7"}],
    },
    step_seconds_estimate=0.2,
    examples_per_second=10240.0,
    mfu_estimate=0.58,
    days=1.85,
    warnings=["3 all-to-alls move 3 MB"],
)  # fmt: skip


def printed(plan):
    console = Console(file=io.StringIO(), width=200)
    plan_tables.show(plan, console)
    return console.file.getvalue()


def test_a_plan_is_printed_with_what_decides():
    text = printed(PLAN)
    sizes = ("256 x v5p", "fsdp 64", "2,048 (8 a chip, in 2 parts)", "75 GiB", "100 GiB", "25.0%", "12.5%", "18.1 P")
    times = ("200 ms", "58.0%", "1.85", "459 TFLOP/s", "fusion.7")
    names = ("all-to-all", "up_0/conv", "bf16[8,64,64,512]")
    for part in (*sizes, *times, *names):
        assert part in text, part


def test_a_plan_that_does_not_fit_says_so_and_what_would_mend_it():
    poor = dataclasses.replace(
        PLAN, fits=False, fits_with_headroom=False, headroom=-0.2, roofline={}, advice=["activations are kept"]
    )
    text = printed(poor)
    assert "NO" in text and "-20.0% (10% is wanted)" in text and "to make it fit: activations are kept" in text


def test_a_search_is_ranked_with_the_options_to_copy():
    console = Console(file=io.StringIO(), width=200)
    rows = [("--config.mesh.fsdp=64", PLAN, ""), ("--config.mesh.fsdp=1", None, "arguments alone take 200 GiB")]
    console.print(plan_tables.ranking(rows))
    text = console.file.getvalue()
    assert text.index("--config.mesh.fsdp=64") < text.index("--config.mesh.fsdp=1 ")
    assert "200 ms" in text and "arguments alone take 200 GiB" in text


@pytest.mark.parametrize(
    ("path", "short"),
    [
        ("jit(wrapped)/jvp(UNet)/UNet._block/up_0/silu/mul", "UNet/UNet._block/up_0/silu/mul"),
        ("jit(step)/transpose(jvp(CLIP))/stack/while/body/closed_call/out/dot", "CLIP/stack/out/dot (gradient)"),
        ("", "(made by the compiler)"),
    ],
)
def test_a_path_keeps_the_modules_and_loses_what_tracing_adds(path, short):
    assert short_path(path) == short


@pytest.fixture
def page(tmp_path, monkeypatch):
    page = tmp_path / "pods.md"
    page.write_text(f"before\n{pod_plans.BEGIN}\nold\n{pod_plans.END}\nafter\n")
    monkeypatch.setattr(pod_plans, "PAGE", page)
    return page


def test_the_page_holds_the_plans_that_were_kept_and_their_commands(page, tmp_path):
    kept = {"command": "python -m unclip_jax.plan …", "seconds": 660.0, "peak_bytes": 13e9, "plan": PLAN.as_dict()}
    (tmp_path / "decoder_v5p-512.json").write_text(json.dumps({**kept, "error": ""}))
    pod_plans.write(page, pod_plans.table(tmp_path))
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    row = next(line for line in text.splitlines() if line.startswith("| decoder | v5p-512"))
    sizes = ("data 4 x fsdp 64", "2,048 in 2 parts", "| full |", "75.0 of 100.0 GiB", "25%", "11.0 min, 13.0 GB")
    for part in (*sizes, "| 3 |", "200 ms", "58%"):
        assert part in row, part
    assert kept["command"] in text and text.count("not planned yet") == len(pod_plans.STAGES) * 4 - 1
    widths = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert len(widths) == 1, "every row has all columns"


def test_a_failed_plan_is_kept_with_its_error(tmp_path):
    kept = pod_plans.make(["-c", "import sys; sys.exit('error: no such slice')"], tmp_path / "a.json", limit=60)
    assert kept["plan"] is None and "no such slice" in kept["error"] and kept["peak_bytes"] > 1e6
    assert "no such slice" in pod_plans.row("clip", "v5p-512", kept)[2]
    late = pod_plans.make(["-c", "import time; time.sleep(60)"], tmp_path / "b.json", limit=1)
    assert late["plan"] is None and late["seconds"] < 30
