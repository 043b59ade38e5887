"""Two scripts as people write them, of which not a line changes but the model's name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from offload.presence import modules, on_device
from pipelines.reuse import like

import greenroom
import greenroom.sim as sim
from greenroom.hooks import OffloadHook
from greenroom.zoo.tiny import tiny

BASIC = """\
from diffusers import DiffusionPipeline
import torch

# Load a large pipeline that might not fit in GPU memory
pipe = DiffusionPipeline.from_pretrained(
    "stabilityai/stable-diffusion-xl-base-1.0",
    torch_dtype=torch.float16,
    use_safetensors=True,
    variant="fp16",
)

# Enable model-level CPU offloading (single line optimization)
pipe.enable_model_cpu_offload()

# Run inference as usual - offloading is handled transparently
image = pipe("A serene landscape with rolling hills").images[0]
image.save("landscape.png")
"""

ON_A_CHOSEN_GPU = """\
from diffusers import DiffusionPipeline
import torch

pipe = DiffusionPipeline.from_pretrained(
    "stabilityai/stable-diffusion-xl-base-1.0",
    torch_dtype=torch.float16,
)

# Use a specific GPU for offloading
pipe.enable_model_cpu_offload(gpu_id=1)

image = pipe("A futuristic city skyline at night").images[0]
"""

# By the example: the device that it runs on, and how the model is stored.
EXAMPLES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "basic": (BASIC, 0, {"variant": "fp16", "safe_serialization": True}),
    "on a chosen gpu": (ON_A_CHOSEN_GPU, 1, {}),
}


@pytest.fixture(params=EXAMPLES)
def example(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[str, int]:
    """The script with a local folder in place of the hub's name, and its device; run it here."""
    text, index, stored = EXAMPLES[request.param]
    pipe = tiny("sdxl")
    # The examples leave the number of steps at 50: as few operators for each as a UNet can have.
    pipe.unet = like(
        pipe.unet,
        sample_size=8,
        block_out_channels=(32,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        attention_head_dim=4,
        transformer_layers_per_block=1,
    )
    pipe.to(torch.float16).save_pretrained(tmp_path / "model", **stored)
    monkeypatch.chdir(tmp_path)
    return text.replace("stabilityai/stable-diffusion-xl-base-1.0", "model"), index


def test_the_example_after_install(
    example: tuple[str, int], installed: None, two_devices: None
) -> None:
    script, index = example
    names: dict[str, Any] = {}
    torch.manual_seed(0)
    with sim.measure(index) as cost, sim.measure(1 - index) as other:
        exec(compile(script, "example.py", "exec"), names)
    pipe, device = names["pipe"], torch.device("sim", index)
    assert pipe._execution_device == device and on_device(pipe) == []
    assert all(isinstance(module._hf_hook, OffloadHook) for module in modules(pipe).values())
    assert cost.kernels > 1000 and cost.races == [] and other.kernels == 0

    # The same pipeline wholly on the same device, asked the same with the same random numbers.
    greenroom.disable_model_cpu_offload(pipe)
    pipe.to(device)
    prompt = next(line for line in script.splitlines() if line.startswith("image = ")).split('"')[1]
    torch.manual_seed(0)
    expected = pipe(prompt).images[0]
    assert expected.tobytes() == names["image"].tobytes()
    if "landscape.png" in script:
        assert PIL.Image.open("landscape.png").tobytes() == expected.tobytes()


def test_the_example_under_exec(example: tuple[str, int], tmp_path: Path) -> None:
    script, index = example
    epilogue = (
        "from greenroom.hooks import OffloadHook\n"
        f"assert pipe._execution_device == torch.device('sim', {index})\n"
        "assert isinstance(pipe.unet._hf_hook, OffloadHook)\n"
        "assert pipe.unet.device == torch.device('cpu')\n"
        "print(image.size)\n"
    )
    (tmp_path / "example.py").write_text(script + epilogue)
    command = ["greenroom", "exec", "--simulate", "rtx-4090", "--devices", "2", "example.py"]
    done = subprocess.run(
        [sys.executable, "-m", *command],
        env={**os.environ, "PYTHONPATH": str(Path(greenroom.__file__).parents[1])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(16, 16)"
    if "landscape.png" in script:
        assert PIL.Image.open("landscape.png").size == (16, 16)
