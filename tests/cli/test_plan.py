"""`greenroom plan`, as somebody uses it who has a pipeline's configs and no GPU."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from cli.usage import BRIEF, Command, Done, Saved
from PIL import Image

from greenroom.model_folder import open_folder
from greenroom.zoo import tiny


def report(done: Done) -> dict[str, Any]:
    assert done.code in (0, 1), done.err
    return json.loads(done.out)


@pytest.fixture
def configs(saved: Saved, tmp_path: Path) -> Any:
    """A folder with the configs of a small pipeline, and none of its weights."""

    def copy(name: str) -> Path:
        folder = tmp_path / "configs" / name
        shutil.copytree(saved(name), folder, ignore=shutil.ignore_patterns("*.safetensors"))
        return folder

    return copy


@pytest.mark.slow
@pytest.mark.parametrize("name", BRIEF)
def test_configs_are_enough(name: str, greenroom_command: Command, configs: Any) -> None:
    folder = configs(name)
    done = greenroom_command(
        *["plan", folder, "--simulate", "rtx-4090", "--budget", "1GiB", *BRIEF[name], "--json"]
    )
    found = report(done)
    assert done.code == 0 and found["fits"] and found["runs"]
    assert found["pipeline"] == open_folder(folder).pipeline_class.__name__
    assert (found["device"], found["simulated"]) == ("rtx-4090", True)
    assert found["budget_bytes"] == 2**30
    assert found["settings"]["num_inference_steps"] == 2
    # It is small: all of it stays.
    assert found["h2d_bytes"] == 0 and found["bound_by"] == "compute"
    assert found["weights_bytes"] <= found["peak_bytes"] <= found["budget_bytes"]
    assert sum(part["weights_bytes"] for part in found["components"]) == found["weights_bytes"]
    budgets = [point["budget_bytes"] for point in found["curve"]]
    assert budgets == sorted(budgets) and len(budgets) >= 10
    assert budgets[0] == found["smallest_budget_bytes"] <= found["free_budget_bytes"]
    assert found["free_budget_bytes"] <= found["resident_budget_bytes"]
    assert all(point["runs"] for point in found["curve"])
    assert "Traceback" not in done.err


@pytest.mark.slow
def test_too_small_a_budget_exits_with_1_and_says_the_smallest_that_would_do(
    greenroom_command: Command, saved: Saved
) -> None:
    call = ["plan", saved("sdxl"), "--device", "rtx-4090", *BRIEF["sdxl"]]
    done = greenroom_command(*call, "--budget", "100KiB")
    assert done.code == 1
    assert "It does not run within 100.0 KiB" in done.out
    (smallest,) = re.findall(r"within is \S+ \S+ \(--budget (\d+)\)", " ".join(done.out.split()))
    again = greenroom_command(*call, "--budget", smallest, "--json")
    assert again.code == 0, smallest
    # Its parts are cut finer for a smaller budget, so a little less may do; half of it does not.
    less = greenroom_command(*call, "--budget", int(smallest) // 2, "--json")
    assert less.code == 1 and not report(less)["fits"]


@pytest.mark.slow
def test_a_picture_and_a_trace_are_written_and_the_trace_says_the_same(
    greenroom_command: Command, saved: Saved
) -> None:
    call = ["plan", saved("sdxl"), "--simulate", "rtx-4060-laptop", *BRIEF["sdxl"]]
    files = ["-o", "curve.png", "--save-trace", "trace.json"]
    done = greenroom_command(*call, "--budget", "2MiB", "--json", *files)
    with Image.open("curve.png") as picture:
        assert picture.size == (900, 500)
    assert Path("trace.json").stat().st_size < 100_000
    again = greenroom_command("plan", "--from-trace", "trace.json", "--budget", "2MiB", "--json")
    mine, theirs = report(done), report(again)
    assert theirs["budget_bytes"] == mine["budget_bytes"] == 2 * 2**20
    for figure in ("later_call_s", "first_call_s", "lower_bound_s"):
        assert theirs[figure] == pytest.approx(mine[figure], rel=1e-3)
    assert theirs["smallest_budget_bytes"] == mine["smallest_budget_bytes"]
    other = greenroom_command("plan", "--from-trace", "trace.json", "--budget", "100%", "--json")
    assert report(other)["later_call_s"] < mine["later_call_s"]


@pytest.mark.slow
def test_the_table_answers_whether_how_fast_and_why_not_faster(
    greenroom_command: Command, saved: Saved
) -> None:
    done = greenroom_command("plan", saved("sd"), "--simulate", "rtx-4090", "--steps", 2)
    assert done.code == 0, done.err
    assert "It runs: the first call takes" in done.out
    assert "It is bound by compute" in done.out
    assert "asked for" not in done.out or "all stays" in done.out
    assert re.search(r"smallest budget that runs: \S+ [KM]iB \(--budget \d+\)", done.out)
    assert "first call: from an empty device" in done.out
    assert len(done.err.splitlines()) == 1  # what it is at, and no progress where nobody sees it


@pytest.mark.slow
def test_what_run_and_bench_compute_in_is_pointed_at_where_it_is_another_dtype(
    greenroom_command: Command, tmp_path: Path
) -> None:
    tiny("sd", dtype=torch.float16).save_pretrained(tmp_path / "halves")
    call = ["plan", tmp_path / "halves", "--steps", 1]
    assert "--dtype float32 plans for that" in greenroom_command(*call).err
    assert "run and bench" not in greenroom_command(*call, "--dtype", "float16").err


@pytest.mark.slow
def test_where_nobody_tells_the_dtype_it_is_said(greenroom_command: Command, configs: Any) -> None:
    folder = configs("sd")
    for file in folder.glob("*/config.json"):
        content = json.loads(file.read_text())
        file.write_text(json.dumps({k: v for k, v in content.items() if "dtype" not in k}))
    done = greenroom_command("plan", folder, "--steps", 1, "--json")
    assert report(done)["dtype"] == "float32"
    assert done.err.splitlines()[1:] == [
        "there are no weights, and no config tells their dtype: --dtype does"
    ]
    done = greenroom_command("plan", folder, "--steps", 1, "--dtype", "bfloat16")
    assert "no config" not in done.err


@pytest.mark.slow
def test_the_dtype_is_as_stored_or_as_said(greenroom_command: Command, saved: Saved) -> None:
    call = ["plan", saved("sd"), "--simulate", "rtx-4090", "--steps", 1, "--json"]
    stored, half = (
        report(greenroom_command(*call)),
        report(greenroom_command(*call, "--dtype", "float16")),
    )
    assert (stored["dtype"], half["dtype"]) == ("float32", "float16")
    assert half["weights_bytes"] < 0.6 * stored["weights_bytes"]


# ---- what cannot be built


def edit(file: Path, **values: Any) -> None:
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, **values}))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (
            lambda folder: edit(folder / "model_index.json", _class_name="NoSuchPipeline"),
            "has no such pipeline",
        ),
        (
            lambda folder: edit(folder / "model_index.json", unet=["diffusers", "NoSuchModel"]),
            "unet is a NoSuchModel of 'diffusers', and there is no such class here",
        ),
        (
            lambda folder: edit(folder / "model_index.json", unet=["my_code", "MyModel"]),
            "code of the folder's own is not run",
        ),
        (lambda folder: (folder / "unet" / "config.json").unlink(), "and no config.json"),
        (lambda folder: shutil.rmtree(folder / "vae"), "there is no folder"),
        (
            lambda folder: edit(folder / "unet" / "config.json", down_block_types=["NoSuchBlock"]),
            "unet cannot be built as a UNet2DConditionModel",
        ),
        (
            lambda folder: edit(
                folder / "unet" / "config.json", quantization_config={"quant_method": "gguf"}
            ),
            "unet is quantised (gguf)",
        ),
        (lambda folder: (folder / "unet" / "config.json").write_text("{"), "is no JSON"),
    ],
)
def test_what_cannot_be_built_is_one_error_that_names_it(
    spoil: Any, said: str, greenroom_command: Command, saved: Saved, tmp_path: Path
) -> None:
    folder = tmp_path / "spoilt"
    shutil.copytree(saved("sd"), folder)
    spoil(folder)
    done = greenroom_command("plan", folder, "--simulate", "rtx-4090", "--steps", 1)
    assert done.code == 2 and done.out == ""
    (sentence,) = [line for line in done.err.splitlines() if line.startswith("greenroom: ")]
    assert said in sentence


@pytest.mark.slow
def test_a_tokenizer_that_is_not_there_is_replaced(
    greenroom_command: Command, saved: Saved, tmp_path: Path
) -> None:
    call = ["--simulate", "rtx-4090", *BRIEF["flux"], "--json"]
    folder = tmp_path / "without"
    shutil.copytree(saved("flux"), folder, ignore=shutil.ignore_patterns("tokenizer*"))
    done = greenroom_command("plan", folder, *call)
    assert done.code == 0, done.err
    whole = report(greenroom_command("plan", saved("flux"), *call))
    assert report(done)["later_call_s"] == pytest.approx(whole["later_call_s"], rel=0.01)


# ---- wrong usage


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "name the pipeline's folder"),
        (["nowhere"], "there is no folder 'nowhere'"),
        (["{sd}", "--simulate", "rtx-9999"], "rtx-9999"),
        (["{sd}", "--simulate", "rtx-4090", "--budget", "a lot"], "is no size"),
        (["{sd}", "--simulate", "rtx-4090", "--budget", "0"], "leaves no memory"),
        (["{sd}", "--simulate", "rtx-4090", "--budget", "48GiB"], "rtx-4090 has 24.0 GiB"),
        (["{sd}", "--simulate", "rtx-4090", "--budget", "auto"], "which nobody knows before"),
        (["{sd}", "--simulate", "rtx-4090", "--budget", "120%"], "at most 100 %"),
        (["{sd}", "--dtype", "int3"], "there is no dtype 'int3'"),
        (["{sd}", "--steps", "0"], "invalid value for '--steps'"),
        (["{sd}", "--nothing"], "no such option: --nothing"),
        (["{sd}", "--budget"], "requires an argument"),
        (["--from-trace", "no-such-file.json"], "there is no trace 'no-such-file.json'"),
        (["{sd}", "--set", "colour=red"], "has no setting 'colour'"),
        (["{sd}", "--size", "large"], "--size is width x height"),
        (["{sd}", "-o", "curve.gif"], "drawn as a PNG"),
        (["{sd}", "-o", "nowhere/curve.png"], "cannot be written"),
        (["{sd}", "--from-trace", "trace.json"], "leave out MODEL_DIR"),
        (["--from-trace", "trace.json", "--steps", "4"], "leave out --steps"),
    ],
)
def test_wrong_usage_exits_with_2_and_a_sentence(
    arguments: list[str], said: str, greenroom_command: Command, saved: Saved
) -> None:
    done = greenroom_command("plan", *(a.format(sd=saved("sd")) for a in arguments))
    assert done.code == 2 and done.out == ""
    (line,) = done.err.splitlines()  # nothing was begun
    assert line.startswith("greenroom: ") and said in line
    assert list(Path().glob("*.*")) == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("not json", "it is no JSON"),
        ('{"format": "something"}', "is no trace"),
        ('{"format": "greenroom trace", "version": 99}', "of version 99"),
        ('{"format": "greenroom trace", "version": 1}', "it lacks 'card'"),
    ],
)
def test_a_trace_that_cannot_be_read_says_why(
    text: str, said: str, greenroom_command: Command, tmp_path: Path
) -> None:
    (tmp_path / "bad.json").write_text(text)
    done = greenroom_command("plan", "--from-trace", "bad.json")
    assert done.code == 2 and said in done.err
