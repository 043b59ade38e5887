"""`greenroom run`, as somebody uses it who has a pipeline in a folder and no GPU."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from cli.usage import BRIEF, Command, Done, Saved
from PIL import Image

from greenroom import jobs, sim
from greenroom.model_folder import open_folder
from greenroom.zoo import tiny


def report(done: Done) -> dict[str, Any]:
    assert done.code == 0, done.err
    return json.loads(done.out)


def rows(done: Done) -> dict[str, dict[str, Any]]:
    return {row["way"]: row for row in report(done)["rows"]}


@pytest.mark.slow
@pytest.mark.parametrize("name", BRIEF)
def test_both_ways_give_the_same_answer_and_greenrooms_copies_no_weight_back(
    name: str, greenroom_command: Command, saved: Saved
) -> None:
    done = greenroom_command("run", saved(name), "a red circle", *BRIEF[name], "--json")
    both = rows(done)
    assert list(both) == ["model offload", "greenroom"]
    theirs, ours = both.values()
    assert theirs["fits"] and ours["fits"]
    assert (theirs["same_output"], ours["same_output"]) == (None, True)
    assert theirs["races"] == ours["races"] == 0
    weights = report(done)["weights_bytes"]
    assert theirs["d2h_bytes"] > weights
    assert ours["d2h_bytes"] < theirs["d2h_bytes"] - 0.9 * weights
    assert ours["peak_bytes"] <= report(done)["capacity_bytes"]


@pytest.mark.slow
def test_the_picture_is_the_one_that_the_pipeline_makes_by_itself(
    greenroom_command: Command, saved: Saved
) -> None:
    done = greenroom_command("run", saved("sd"), "a red circle", "--steps", 2, "--seed", 3)
    assert done.code == 0, done.err
    assert "wrote picture.png" in done.out
    sim.configure()
    pipe = tiny("sd").to("sim")
    expected = pipe(
        "a red circle",
        num_inference_steps=2,
        generator=torch.Generator("cpu").manual_seed(3),
        output_type="pil",
    ).images[0]
    assert np.array_equal(np.asarray(Image.open("picture.png")), np.asarray(expected))
    assert sorted(path.name for path in Path().iterdir()) == ["picture.png"]


@pytest.mark.slow
def test_the_same_seed_gives_the_same_file_and_another_seed_another(
    greenroom_command: Command, saved: Saved
) -> None:
    for name, seed in {"a.png": 0, "b.png": 0, "c.png": 1}.items():
        done = greenroom_command(
            *["run", saved("sd"), "a red circle", "--steps", 1, "--seed", seed, "-o", name],
            "--no-compare",
        )
        assert done.code == 0, done.err
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
    assert Path("a.png").read_bytes() != Path("c.png").read_bytes()


@pytest.mark.slow
def test_without_comparison_only_greenroom_runs(greenroom_command: Command, saved: Saved) -> None:
    done = greenroom_command(
        "run", saved("sd"), "a red circle", "--steps", 1, "--no-compare", "--calls", 2, "--json"
    )
    (row,) = rows(done).values()
    assert (row["way"], row["same_output"], len(row["call_seconds"])) == ("greenroom", None, 2)


@pytest.mark.slow
def test_a_film_is_written_as_a_moving_picture_or_as_a_sheet(
    greenroom_command: Command, saved: Saved
) -> None:
    call = ["run", saved("wan"), "a red circle", *BRIEF["wan"], "--no-compare"]
    done = greenroom_command(*call, "--json")
    assert report(done)["files"] == ["video.gif"]
    with Image.open("video.gif") as film:
        assert (film.n_frames, film.size) == (5, (32, 32))
    assert report(greenroom_command(*call, "-o", "film.png", "--json"))["files"] == ["film.png"]
    with Image.open("film.png") as sheet:
        assert sheet.size == (3 * 32, 2 * 32)


@pytest.mark.slow
def test_arrays_are_written_as_they_were_computed(greenroom_command: Command, saved: Saved) -> None:
    done = greenroom_command(
        "run", saved("sd"), "a red circle", "--steps", 1, "--no-compare", "-o", "answer.npz"
    )
    assert done.code == 0, done.err
    (picture,) = np.load("answer.npz")["images"]
    assert (picture.dtype, picture.shape) == (np.float32, (32, 32, 3))


@pytest.mark.slow
def test_the_table_shows_each_way_with_its_bytes(greenroom_command: Command, saved: Saved) -> None:
    done = greenroom_command("run", saved("sd"), "a red circle", "--steps", 1)
    table = [line.split() for line in done.out.splitlines()]
    (theirs,) = [line for line in table if line[:2] == ["model", "offload"]]
    (ours,) = [line for line in table if line[:1] == ["greenroom"]]
    assert theirs[-2:] == ["0", "-"] and ours[-2:] == ["0", "yes"]
    assert "StableDiffusionPipeline" in done.out and "rtx-4060-laptop" in done.out


@pytest.mark.slow
def test_another_card_gives_other_times_and_the_same_file(
    greenroom_command: Command, saved: Saved
) -> None:
    seconds, files = [], []
    for card in ("rtx-4060-laptop", "h200"):
        done = greenroom_command(
            *["run", saved("sd"), "a red circle", "--steps", 1, "--no-compare", "--json"],
            *["--simulate", card, "--capacity", "64MiB"],
        )
        assert (report(done)["simulated"], report(done)["capacity_bytes"]) == (card, 64 * 2**20)
        seconds.append(rows(done)["greenroom"]["call_seconds"][0])
        files.append(Path("picture.png").read_bytes())
    assert seconds[0] > seconds[1] and files[0] == files[1]


@pytest.mark.slow
def test_a_pipeline_saved_in_halves_under_a_variant_is_loaded(
    greenroom_command: Command, tmp_path: Path
) -> None:
    folder = tmp_path / "halves"
    tiny("sd", dtype=torch.float16).save_pretrained(folder, variant="fp16")
    found = open_folder(folder)
    assert (found.variant, found.stored_dtype) == ("fp16", torch.float16)
    done = greenroom_command("run", folder, "a red circle", "--steps", 1, "--json")
    # Computed by the CPU's kernels, which are slow in float16.
    assert report(done)["dtype"] == "float32"
    assert "--dtype float16 computes in it all the same" in done.err
    done = greenroom_command(
        "run", folder, "a red circle", "--steps", 1, "--json", "--dtype", "bfloat16"
    )
    assert report(done)["dtype"] == "bfloat16"
    assert rows(done)["greenroom"]["same_output"] is True


# ---- what cannot be


WRONG = {
    "no folder": ([], "nowhere", "there is no folder"),
    "no pipeline": ([], ".", "it has no model_index.json"),
    "device": (["--device", "warp"], None, "there is no accelerator 'warp'"),
    "absent device": (["--device", "xpu:7"], None, "there is no accelerator 'xpu:7' here"),
    "no accelerator": (["--device", "cpu"], None, "there is no accelerator 'cpu'"),
    "card": (["--simulate", "rtx-1"], None, "no profile is called 'rtx-1'"),
    "capacity": (["--capacity", "plenty"], None, "'plenty' is no size"),
    "steps": (["--steps", "0"], None, "invalid value for '--steps': it should be greater"),
    "no such option": (["--nothing"], None, "no such option: --nothing"),
    "dtype": (["--dtype", "int8"], None, "there is no dtype 'int8'"),
    "size": (["--size", "512"], None, "not '512'"),
    "size twice": (["--size", "32x32", "--width", "32"], None, "leave out --width"),
    "no name": (["--set", "5"], None, "--set takes NAME=VALUE"),
    "a name that has an option": (["--set", "prompt=x"], None, "'prompt'"),
    "unknown setting": (["--set", "guidance=5"], None, "did you mean 'guidance_scale'?"),
    "refused by the pipeline": (["--size", "31x31"], None, "divisible by 8"),
    "ending": (["-o", "picture.doc"], None, "the ending of 'picture.doc'"),
    "folder of the output": (["-o", "nowhere/a.png"], None, "'nowhere'"),
}


@pytest.mark.parametrize(("options", "model", "reason"), WRONG.values(), ids=WRONG)
def test_wrong_usage_is_one_sentence_and_exit_code_2(
    options: list[str],
    model: str | None,
    reason: str,
    greenroom_command: Command,
    saved: Saved,
) -> None:
    done = greenroom_command("run", model or saved("sd"), "a red circle", *options)
    assert (done.code, done.out) == (2, "")
    last = done.err.splitlines()[-1]
    assert last.startswith("greenroom: ") and reason in last
    assert "Traceback" not in done.err
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    ("name", "missing"), [("sdxl-img2img", "image"), ("sdxl-controlnet", "image")]
)
def test_a_pipeline_that_needs_more_than_a_prompt_says_what(
    name: str, missing: str, greenroom_command: Command, saved: Saved
) -> None:
    done = greenroom_command("run", saved(name), "a red circle", "--steps", 1)
    assert done.code == 2
    assert f"needs more than a prompt: {missing}" in done.err.splitlines()[-1]
    assert list(Path().iterdir()) == []


def test_what_a_class_needs_is_known_before_its_weights_are_loaded(
    greenroom_command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As diffusers stands in for classes that it cannot import.
    needy = type("NeedyPipeline", (), {"_backends": ["torch", "no_such_library"]})
    monkeypatch.setattr(diffusers, "NeedyPipeline", needy, raising=False)
    index = tmp_path / "model_index.json"
    for name, missing in {
        "WanImageToVideoPipeline": "needs more than a prompt: image",
        "StableVideoDiffusionPipeline": "takes no prompt",
        "NoSuchPipeline": "has no such pipeline",
        "AutoencoderKL": "has no such pipeline",
        "NeedyPipeline": "needs no_such_library, not installed here",
    }.items():
        index.write_text(json.dumps({"_class_name": name}), encoding="utf-8")
        done = greenroom_command("run", tmp_path, "a red circle")
        assert done.code == 2 and missing in done.err
        assert "loading" not in done.err
    index.write_text("{", encoding="utf-8")
    assert "does not say what pipeline it is" in greenroom_command("run", tmp_path, "x").err


@pytest.mark.parametrize("is_seen", [False, True])
def test_loading_shows_its_progress_where_there_is_somebody_to_see_it(
    is_seen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr", io.StringIO())
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_seen)
    diffusers.utils.logging.enable_progress_bar()
    jobs._quieten(shows_loading=True)
    assert diffusers.utils.logging.is_progress_bar_enabled() == is_seen
    jobs._quieten()  # the demo loads what is small, seven times
    assert not diffusers.utils.logging.is_progress_bar_enabled()


def test_a_broken_folder_is_one_sentence_and_exit_code_1(
    greenroom_command: Command, saved: Saved, tmp_path: Path
) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(saved("sd"), folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    done = greenroom_command("run", folder, "a red circle")
    assert (done.code, done.out) == (1, "")
    assert "could not be loaded as a StableDiffusionPipeline" in done.err.splitlines()[-1]


@pytest.mark.slow
def test_a_device_too_small_for_any_way_is_told_and_nothing_is_written(
    greenroom_command: Command, saved: Saved
) -> None:
    done = greenroom_command("run", saved("sd"), "a red circle", "--capacity", "1MiB")
    assert done.code == 1
    assert done.out.count("does not fit") == 2
    assert "out of memory" in done.err.splitlines()[-1] and "--capacity" in done.err
    assert list(Path().iterdir()) == []


@pytest.mark.slow
def test_an_answer_that_differs_is_written_beside_the_one_expected(
    greenroom_command: Command, saved: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(pipe: Any, device: torch.device) -> None:
        pipe.vae.decoder.conv_out.weight.data.mul_(1.5)
        pipe.to(device)

    monkeypatch.setattr(jobs, "TWO_WAYS", {**jobs.TWO_WAYS, "greenroom": spoil})
    done = greenroom_command("run", saved("sd"), "a red circle", "--steps", 1)
    assert done.code == 1 and "NO" in done.out
    assert Path("picture.png").read_bytes() != Path("picture-expected.png").read_bytes()
