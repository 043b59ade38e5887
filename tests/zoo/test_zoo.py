"""The zoo: small pipelines run, full-size ones are the published models and cost no memory."""

import inspect
import json
import os
import re
import subprocess
import sys
import time

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from greenroom import zoo
from greenroom.zoo.tokenizers import require

GB = 10**9


def modules(pipe):
    return {k: c for k, c in pipe.components.items() if isinstance(c, torch.nn.Module)}


def nbytes(module):
    return sum(parameter.nbytes for parameter in module.parameters())


def run(pipe, name, **overrides):
    return pipe(**{**zoo.call_kwargs(name), **overrides}, return_dict=False)[0]


# --- tokenizers ---------------------------------------------------------------------------------


def encode(tokenizer, text, length):
    return tokenizer(
        text, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids[0]


@pytest.mark.parametrize("vocabulary", [514, 49408])
def test_a_clip_tokenizer_ends_where_the_text_encoder_looks(vocabulary):
    tokenizer = zoo.clip_tokenizer(vocabulary)
    ids = encode(tokenizer, "a red circle", tokenizer.model_max_length)
    start, end = vocabulary - 2, vocabulary - 1
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (start, end)
    assert len(tokenizer) == vocabulary
    assert len(ids) == 77
    assert ids[0] == start and ids.max() == end and ids.argmax() == 1 + len("aredcircle")
    assert torch.equal(ids, encode(zoo.clip_tokenizer(vocabulary), "a red circle", 77))
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a red circle"


def test_a_clip_tokenizer_truncates_and_spells_any_text():
    ids = encode(zoo.clip_tokenizer(), "über 円 🙂 " * 30, 77)
    assert len(ids) == 77 and ids[-1] == 513
    assert ids.min() >= 0


def test_sdxl_pads_its_second_prompt_with_exclamation_marks():
    tokenizer = zoo.clip_tokenizer(49408, pad_token="!")
    assert encode(tokenizer, "a", 5).tolist() == [49406, 320, 49407, 0, 0]
    assert len(tokenizer) == 49408


@pytest.mark.parametrize("vocabulary", [128, 32100])
def test_a_t5_tokenizer_ends_and_pads_like_t5(vocabulary):
    tokenizer = zoo.t5_tokenizer(vocabulary)
    ids = encode(tokenizer, "a red circle", 18)
    assert len(tokenizer) == vocabulary
    assert ids[-5:].tolist() == [1, 0, 0, 0, 0]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a red circle"
    assert encode(tokenizer, "円", 3).tolist()[1:] == [2, 1]
    if vocabulary > 228:
        assert tokenizer.convert_tokens_to_ids("<extra_id_0>") == vocabulary - 1


def test_vocabularies_too_small_to_spell_are_refused():
    with pytest.raises(ValueError, match="at least 514"):
        zoo.clip_tokenizer(100)
    with pytest.raises(ValueError, match="at least 98"):
        zoo.t5_tokenizer(90)


# --- tiny ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", zoo.TINY)
def test_a_tiny_pipeline_is_small_quick_and_its_picture_depends_on_everything(name):
    pipe = zoo.tiny(name)
    assert 2e5 < sum(map(nbytes, modules(pipe).values())) < 12e6
    first = run(pipe, name)
    begin = time.process_time()
    again = run(pipe, name)
    assert time.process_time() - begin < 1.0
    assert first.shape == ((1, 5, 3, 32, 32) if "wan" in name else (1, 3, 32, 32))
    assert first.isfinite().all() and first.std() > 0.01
    assert torch.equal(first, again)
    assert torch.equal(first, run(zoo.tiny(name), name))
    assert not torch.equal(first, run(pipe, name, prompt="two blue squares"))
    assert not torch.equal(first, run(zoo.tiny(name, seed=1), name))
    assert not torch.equal(first, run(pipe, name, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("name", zoo.TINY)
def test_a_tiny_pipeline_takes_half_precision(name):
    pipe = zoo.tiny(name, dtype=torch.bfloat16)
    assert {component.dtype for component in modules(pipe).values()} == {torch.bfloat16}
    assert run(pipe, name).float().isfinite().all()
    # The cast rounds the float32 weights; it does not draw new ones.
    half, single = modules(pipe)["vae"], modules(zoo.tiny(name))["vae"]
    for a, b in zip(half.parameters(), single.parameters(), strict=True):
        assert torch.equal(a.float(), b.bfloat16().float())


def test_building_leaves_the_random_state_alone():
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    zoo.tiny("sdxl")
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("name", ["sdxl-controlnet", "sdxl-img2img"])
def test_the_given_picture_matters(name):
    pipe = zoo.tiny(name)
    dark = torch.zeros(1, 3, 32, 32)
    assert not torch.equal(run(pipe, name), run(pipe, name, image=dark))


def test_both_of_wans_experts_work():
    pipe = zoo.tiny("wan2.2")
    seen = []
    for name in ("transformer", "transformer_2"):
        getattr(pipe, name).register_forward_pre_hook(lambda *_, name=name: seen.append(name))
    run(pipe, "wan2.2")
    assert seen == ["transformer"] * 2 + ["transformer_2"] * 2  # with and without the prompt


def test_two_calls_never_share_a_generator():
    assert zoo.call_kwargs("sd")["generator"] is not zoo.call_kwargs("sd")["generator"]


def test_what_is_published_to_stay_in_float32_stays():
    wan = zoo.tiny("wan", dtype=torch.bfloat16)
    kept = {n for n, p in wan.transformer.named_parameters() if p.dtype == torch.float32}
    assert {"scale_shift_table", "blocks.0.norm2.weight"} <= kept
    assert "blocks.0.attn1.to_q.weight" not in kept
    assert {p.dtype for p in wan.text_encoder.parameters()} == {torch.bfloat16}
    t5 = zoo.tiny("flux", dtype=torch.float16).text_encoder_2
    kept = {n for n, p in t5.named_parameters() if p.dtype == torch.float32}
    assert kept and all(".wo." in n for n in kept)


@pytest.mark.slow
def test_the_demo_is_sdxl_at_a_size_worth_copying():
    pipe = zoo.demo_sdxl()
    sizes = {name: nbytes(module) for name, module in modules(pipe).items()}
    assert set(sizes) == {"text_encoder", "text_encoder_2", "unet", "vae"}
    assert 50e6 < sum(sizes.values()) < 300e6
    assert sizes["unet"] > 2 * sum(n for name, n in sizes.items() if name != "unet")
    assert type(pipe).__name__ == "StableDiffusionXLPipeline"
    begin = time.process_time()
    image = run(pipe, "demo-sdxl")
    assert time.process_time() - begin < 4.0  # below 1 s on an idle core
    assert image.shape == (1, 3, 128, 128) and image.isfinite().all() and image.std() > 0.01


@pytest.mark.parametrize(
    ("ask", "near"),
    [
        (lambda: zoo.tiny("sdlx"), "sdxl"),
        (lambda: zoo.call_kwargs("demo_sdxl"), "demo-sdxl"),
        (lambda: zoo.full("flux1"), "flux"),
        (lambda: zoo.full_call_kwargs("wan22"), "wan2.2"),
    ],
)
def test_an_unknown_name_is_met_with_the_near_miss(ask, near):
    with pytest.raises(ValueError, match=f"Did you mean '{re.escape(near)}'"):
        ask()


def test_a_missing_library_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match=re.escape("greenroom[diffusers,transformers]")):
        zoo.tiny("sdxl")


@pytest.mark.slow
def test_importing_the_zoo_imports_neither_library():
    script = "import sys, greenroom.zoo; print({'diffusers', 'transformers'} & set(sys.modules))"
    assert in_new_process(script) == "set()"


# --- empty_weights ------------------------------------------------------------------------------


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


linux = pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads /proc")


@linux
def test_large_weights_take_no_memory_however_they_are_initialised():
    class Everything(torch.nn.Module):
        def __init__(self):
            super().__init__()
            nn, init = torch.nn, torch.nn.init
            self.linear = nn.Linear(8192, 8192)
            self.embedding = nn.Embedding(50_000, 1024, padding_idx=0)
            self.conv = nn.Conv2d(512, 512, 3)
            self.lstm = nn.LSTM(1024, 1024)
            self.drawn = nn.Parameter(torch.randn(4096, 4096))
            self.table = nn.Parameter(torch.empty(4096, 4096))
            init.trunc_normal_(self.table, std=0.02)
            init.orthogonal_(self.linear.weight)
            init.dirac_(self.conv.weight)
            init.eye_(self.drawn)
            self.linear.weight.data.normal_().mul_(0.02).clamp_(-1, 1)
            self.linear.weight.data[3] = 1.0
            self.zeros = nn.Parameter(torch.zeros(4096, 4096))
            torch.full((4096, 4096), 2.0, out=self.zeros.data)

    with zoo.empty_weights(torch.float16):
        torch.nn.Linear(300, 300)  # what the first operators import is not the weights' memory
        torch.randn(300, 300)
    before = resident_bytes()
    with zoo.empty_weights(torch.float16):
        module = Everything()
        single = torch.nn.Linear(8192, 8192).to(torch.float32)
    assert nbytes(module) > 0.3 * GB
    assert resident_bytes() - before < 16e6
    assert {p.dtype for p in module.parameters()} == {torch.float16}
    assert single.weight.dtype == torch.float32
    assert not module.linear.weight[::1000].any()


def test_small_tensors_and_buffers_are_computed():
    class Rotary(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = torch.nn.LayerNorm(64)
            angles = torch.outer(torch.arange(4096).float(), torch.ones(64, dtype=torch.float32))
            self.register_buffer("freqs", torch.polar(torch.ones_like(angles), angles))
            table = torch.zeros(4096, 64)
            table[:, ::2] = torch.sin(angles[:, ::2]).half()
            table.add_(1.0)
            self.register_buffer("table", table)
            self.register_buffer("scale", torch.ones(100_000))
            self.register_buffer("none", None)
            self.register_buffer("later", torch.zeros(100_000))
            self.scale.mul_(3)
            self.later.fill_(7)

    with zoo.empty_weights(torch.float16):
        empty = Rotary()
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    try:
        real = Rotary()
    finally:
        torch.set_default_dtype(before)
    for (name, a), (_, b) in zip(
        empty.state_dict().items(), real.state_dict().items(), strict=True
    ):
        assert torch.equal(a, b), name


def test_what_is_read_was_written_first():
    with zoo.empty_weights(torch.float32):
        weight = torch.empty(256, 256).fill_(2.0)
        weight[0, 0] = 5.0
        assert float(weight.sum()) == 2.0 * (256 * 256 - 1) + 5.0
        weight.mul_(10)  # written by now, so this one is done at once
        assert float(weight[0, 0]) == 50.0
        drawn = torch.randn(300, 300, generator=generator(5))
        assert torch.equal(drawn * 1, torch.randn(300, 300, generator=generator(5)) * 1)
        frame = torch.nn.Linear(256, 256)
        torch.nn.init.orthogonal_(frame.weight)
        torch.testing.assert_close(
            frame.weight @ frame.weight.T, torch.eye(256), atol=1e-4, rtol=1e-4
        )


def test_a_promised_copy_is_of_the_values_at_that_time():
    with zoo.empty_weights(torch.float32):
        source = torch.empty(256, 256).fill_(2.0)
        double = source.double()
        other = torch.empty(256, 256).copy_(source)
        row, large = torch.full((256,), 7.0), torch.arange(256.0 * 256).view(256, 256)
        rows = torch.empty(256, 256).copy_(row)
        from_large = torch.empty(256, 256).copy_(large)
        for changed in (source, row, large):
            changed.mul_(-1)
        source.add_(1)
        assert float(double.sum()) == float(other.sum()) == 2.0 * 256 * 256
        assert float(source.sum()) == -1.0 * 256 * 256
        assert float(rows.sum()) == 7.0 * 256 * 256
        assert float(from_large[-1, -1]) == 256 * 256 - 1
        own = torch.empty(256, 256).fill_(3.0)
        own.mul_(own)
        assert float(own[5, 5]) == 9.0

        read = torch.empty(256, 256).fill_(2.0)
        half, rows = read.half(), torch.empty(256, 256).copy_(read[3])
        assert float(read.sum()) == 2.0 * 256 * 256  # this writes it ...
        read.fill_(6.0)  # ... and what changes it now still comes after the copies
        assert float(half[0, 0]) == float(rows[0, 0]) == 2.0

        module, source = torch.nn.Module(), torch.ones(256, 256)
        copy = source.double()
        module.register_buffer("table", source)  # written here, outside of any operator
        assert copy.eq(1).all() and module.table.eq(1).all()


def test_operators_with_several_outputs_and_lists_are_done_at_once():
    with zoo.empty_weights(torch.float32):
        weight = torch.empty(300, 300).fill_(4.0)
        largest, where = torch.empty(300), torch.empty(300, dtype=torch.int64)
        torch.max(weight, dim=1, out=(largest, where))
        assert largest.eq(4).all() and weight.eq(4).all()
        first, second = torch.zeros(300, 300), torch.ones(300, 300)
        torch._foreach_add_([first, second], 2.0)
        assert first.eq(2).all() and second.eq(3).all()


def generator(seed):
    return torch.Generator().manual_seed(seed)


def test_layouts_are_those_of_the_real_factories():
    like = torch.empty(2, 64, 64, 64).to(memory_format=torch.channels_last)
    with zoo.empty_weights():
        assert torch.empty_like(like).stride() == like.stride()
        assert torch.zeros_like(like, dtype=torch.int64).dtype == torch.int64
        assert torch.empty(0, 5).shape == (0, 5)
        assert torch.empty(1000, 1000, device="meta").is_meta
        assert like.new_zeros(1000, 1000).shape == (1000, 1000)
        strided = torch.empty_strided((300, 300), (1, 300))
        assert strided.stride() == (1, 300) and strided.t().is_contiguous()


def test_ties_survive():
    with zoo.empty_weights(torch.bfloat16):
        first, second = torch.nn.Embedding(1000, 128), torch.nn.Linear(128, 1000, bias=False)
        second.weight = first.weight
        both = torch.nn.ModuleList([first, second]).to(torch.float32)
    assert both[0].weight is both[1].weight


def test_everything_is_put_back_also_after_an_exception():
    default = torch.get_default_dtype()
    initialisers = {n: getattr(torch.nn.init, n) for n in dir(torch.nn.init) if n.endswith("_")}
    with pytest.raises(RuntimeError, match="halfway"), zoo.empty_weights(torch.float16):
        raise RuntimeError("halfway")
    assert torch.get_default_dtype() == default
    assert {n: getattr(torch.nn.init, n) for n in initialisers} == initialisers
    weight = torch.nn.Linear(300, 300).weight
    assert weight.std() > 0
    module = torch.nn.Module()
    module.register_buffer("after", torch.ones(100_000))
    assert module.after.all()


def test_weights_outlive_the_block_and_can_be_written():
    with zoo.empty_weights(torch.float32), zoo.empty_weights(torch.float16):
        weight = torch.nn.Linear(1000, 1000).weight
    with torch.no_grad():
        weight.fill_(1.5)
    assert weight.sum(dtype=torch.float32) == 1.5e6


# --- full ---------------------------------------------------------------------------------------

CLIP_L, BIG_G, SDXL_UNET, SDXL_VAE = 123_060_480, 694_659_840, 2_567_463_684, 83_653_863
SDXL = {"text_encoder": CLIP_L, "text_encoder_2": BIG_G, "unet": SDXL_UNET, "vae": SDXL_VAE}
FLUX = {"text_encoder": CLIP_L, "text_encoder_2": 4_762_310_656, "vae": 83_819_683}
WAN_EXPERT = 14_288_491_584
PARAMETERS = {
    "sdxl": SDXL,
    "sdxl-img2img": SDXL,
    "sdxl-controlnet": {**SDXL, "controlnet": 1_251_014_160},
    "flux": {**FLUX, "transformer": 11_901_408_320},
    # Less the two layers that embed the guidance scale: 256 -> 3072 -> 3072.
    "flux-schnell": {**FLUX, "transformer": 11_901_408_320 - (257 + 3073) * 3072},
    "wan2.2": {
        "text_encoder": 5_680_910_336,
        "transformer": WAN_EXPERT,
        "transformer_2": WAN_EXPERT,
        "vae": 126_892_531,
    },
}
TOTAL_GB = {
    "sdxl": 6.94,
    "sdxl-img2img": 6.94,
    "sdxl-controlnet": 9.44,
    "flux": 33.74,
    "flux-schnell": 33.72,
    "wan2.2": 69.14,
}

BUILD_ALL = """
import gc, json, os, time, torch
from greenroom import zoo

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

zoo.tiny("wan"), zoo.tiny("flux"), zoo.tiny("sdxl")  # the libraries' own memory is not the question
for name in zoo.FULL:
    gc.collect()
    rss, begin = resident(), time.process_time()
    pipe = zoo.full(name)
    seconds = time.process_time() - begin
    modules = {k: m for k, m in pipe.components.items() if isinstance(m, torch.nn.Module)}
    print(json.dumps({
        "name": name,
        "seconds": seconds,
        "rss": resident() - rss,
        "parameters": {k: sum(p.numel() for p in m.parameters()) for k, m in modules.items()},
        "nbytes": sum(p.nbytes for m in modules.values() for p in m.parameters()),
        "dtypes": {k: sorted({str(p.dtype) for p in m.parameters()}) for k, m in modules.items()},
        "ties": {k: m.shared.weight is m.encoder.embed_tokens.weight
                 for k, m in modules.items() if hasattr(m, "shared")},
    }))
    del pipe, modules
"""


def in_new_process(script):
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def builds():
    """What one process saw of every build, one after the other."""
    return {b["name"]: b for b in map(json.loads, in_new_process(BUILD_ALL).splitlines())}


@linux
@pytest.mark.slow
@pytest.mark.parametrize("name", zoo.FULL)
def test_a_full_pipeline_is_the_published_one_and_costs_no_memory(builds, name):
    build = builds[name]
    assert build["parameters"] == PARAMETERS[name]
    assert build["nbytes"] / GB == pytest.approx(TOTAL_GB[name], abs=0.005)
    assert build["rss"] < 0.25 * GB
    assert build["seconds"] < 10
    assert all(build["ties"].values())


@linux
@pytest.mark.slow
def test_full_pipelines_have_the_dtypes_they_are_run_in(builds):
    assert set(map(tuple, builds["sdxl"]["dtypes"].values())) == {("torch.float16",)}
    assert set(map(tuple, builds["flux"]["dtypes"].values())) == {("torch.bfloat16",)}
    assert builds["wan2.2"]["dtypes"] == {
        "text_encoder": ["torch.bfloat16"],
        "transformer": ["torch.bfloat16", "torch.float32"],
        "transformer_2": ["torch.bfloat16", "torch.float32"],
        "vae": ["torch.float32"],
    }
    assert builds["flux"]["ties"] and builds["wan2.2"]["ties"]


@pytest.mark.parametrize("name", zoo.FULL)
def test_the_standard_call_fits_the_pipeline(name):
    pipe = zoo.full(name)
    call = zoo.full_call_kwargs(name)
    inspect.signature(pipe.__call__).bind(**call)
    assert call["output_type"] == "pt"
    assert zoo.full_call_kwargs(name, num_inference_steps=2)["num_inference_steps"] == 2
    # Computed, not skipped: a wrong scheduler would change what a simulation sees.
    assert pipe.scheduler.config.num_train_timesteps == 1000
    if name.startswith("sdxl"):
        pipe.scheduler.set_timesteps(30)
        assert pipe.scheduler.sigmas[0] == pytest.approx(11.4769, abs=1e-3)
        assert pipe.vae.config.force_upcast
        assert pipe.unet.config.sample_size * pipe.vae_scale_factor == 1024
        assert call.get("image", torch.empty(1, 3, 1024, 1024)).shape == (1, 3, 1024, 1024)
    elif name == "wan2.2":
        assert (pipe.config.boundary_ratio, pipe.config.expand_timesteps) == (0.875, False)
        assert pipe.scheduler.config.flow_shift == 3.0
        assert pipe.transformer.rope.freqs_cos[0].eq(1).all()
        assert pipe.transformer.rope.freqs_sin[1, 0] == pytest.approx(0.8415, abs=1e-4)
    else:
        schnell = name == "flux-schnell"
        assert pipe.scheduler.config.shift == (1.0 if schnell else 3.0)
        assert pipe.scheduler.config.use_dynamic_shifting is not schnell
        assert pipe.transformer.config.guidance_embeds is not schnell


def test_a_full_pipeline_takes_another_dtype():
    pipe = zoo.full("flux", dtype=torch.float16)
    single = {n for n, p in pipe.text_encoder_2.named_parameters() if p.dtype == torch.float32}
    assert len(single) == 24 and all(n.endswith(".wo.weight") for n in single)
    assert pipe.transformer.dtype == torch.float16


def test_a_library_that_is_broken_says_so_itself(monkeypatch, tmp_path):
    (tmp_path / "halfway_there.py").write_text("import no_such_thing")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match="no_such_thing"):
        require("halfway_there")
