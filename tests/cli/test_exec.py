"""`greenroom exec` runs a script as plain Python does, with greenroom behind its offloading."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from cli.usage import Command, Saved

PLAIN = [sys.executable]
#: What `greenroom exec` hands the process over to, without the time that diffusers' import takes.
HANDED_OVER = [
    *[sys.executable, "-c"],
    "import sys; from greenroom.scripts import run_module, run_script; name = sys.argv[1]; "
    "run_module(sys.argv[2], sys.argv[3:]) if name == '-m' else run_script(name, sys.argv[2:])",
]
GREENROOM = [sys.executable, "-m", "greenroom", "exec"]


def run(command: list[str], *arguments: str, cwd: Path, **environment: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [*command, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


SCRIPTS = {
    "sees itself as the program": """
        import sys, __main__
        print(sys.argv, __name__, __file__, __spec__, __package__, sorted(globals()))
        print(sys.path[0], __main__.__dict__ is globals(), type(__loader__).__name__)
    """,
    "imports what lies beside it": """
        import beside
        print(beside.__file__)
    """,
    "pickles its own classes": """
        import pickle
        class Own:
            pass
        print(type(pickle.loads(pickle.dumps(Own()))))
    """,
    "exits with a code": "raise SystemExit(3)",
    "exits with a text": "raise SystemExit('enough')",
    "raises": """
        def outer():
            try:
                1 / 0
            except ZeroDivisionError as error:
                raise ValueError("outer") from error
        outer()
    """,
    "is no Python": "for in",
    "is interrupted": "raise KeyboardInterrupt",
    "prints errors its own way": """
        import sys, traceback
        def hook(kind, error, trace):
            print("mine:", kind, len(traceback.extract_tb(trace)))
        sys.excepthook = hook
        raise OSError
    """,
    "works on in a thread": """
        import threading, time
        def work():
            time.sleep(0.2)
            import __main__
            print(__main__.NAME, NAME)
        NAME = "still here"
        threading.Thread(target=work).start()
    """,
    "leaves work to the end": """
        import atexit, sys
        atexit.register(lambda: print("the end", sys.argv))
        1 / 0
    """,
}


@pytest.mark.parametrize("source", SCRIPTS.values(), ids=SCRIPTS)
def test_a_script_runs_as_under_plain_python(source: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "beside.py").touch()
    lines = source.strip("\n").splitlines()
    indent = len(lines[0]) - len(lines[0].lstrip())
    script = tmp_path / "folder" / "script.py"
    script.write_text("\n".join(line[indent:] for line in lines), encoding="utf-8")
    arguments = ("folder/script.py", "--help", "a b")
    assert run(HANDED_OVER, *arguments, cwd=tmp_path) == run(PLAIN, *arguments, cwd=tmp_path)


def test_modules_and_links_run_as_under_plain_python(tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(
        "import sys; print(sys.argv, __name__, __package__, sys.path[0])", encoding="utf-8"
    )
    (tmp_path / "script.py").write_text("import sys; print(sys.path[0])", encoding="utf-8")
    (package / "link.py").symlink_to(tmp_path / "script.py")
    for arguments in (("-m", "package", "-x"), ("package/link.py",)):
        plain = run(PLAIN, *arguments, cwd=tmp_path)
        assert plain[0] == 0
        assert run(HANDED_OVER, *arguments, cwd=tmp_path) == plain


def test_a_module_that_raises_shows_no_frame_of_greenrooms(tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text("1 / 0", encoding="utf-8")
    code, _, err = run(HANDED_OVER, "-m", "module", cwd=tmp_path)
    assert code == 1 and "greenroom" not in err
    assert err.splitlines()[1] == f'  File "{tmp_path}/module.py", line 1, in <module>'


@pytest.mark.slow
def test_a_script_that_knows_no_simulator_finds_an_accelerator_and_greenroom(
    saved: Saved, tmp_path: Path
) -> None:
    # Nothing in it but diffusers.
    (tmp_path / "picture.py").write_text(
        "import sys\n"
        "import torch\n"
        "from diffusers import DiffusionPipeline\n"
        "pipe = DiffusionPipeline.from_pretrained(sys.argv[1])\n"
        "pipe.enable_model_cpu_offload(gpu_id=1)\n"
        "pipe('a red circle', num_inference_steps=1).images[0].save('picture.png')\n"
        "print(pipe._execution_device, torch.accelerator.device_count(),\n"
        "      torch.accelerator.max_memory_allocated(1) > 0,\n"
        "      type(pipe.unet._hf_hook).__module__)\n"
        "raise RuntimeError('at the end')\n",
        encoding="utf-8",
    )
    code, out, err = run(
        *(GREENROOM, "--simulate", "rtx-4090", "--capacity", "1GiB", "--devices", "2"),
        *("picture.py", str(saved("sd"))),
        cwd=tmp_path,
    )
    assert out.split() == ["sim:1", "2", "True", "greenroom.hooks"], err
    assert (tmp_path / "picture.png").is_file()
    # A traceback of the script's alone, and the code that plain Python ends with.
    assert code == 1
    assert err.split("Traceback (most recent call last):\n")[1:] == [
        f'  File "{tmp_path}/picture.py", line 10, in <module>\n'
        "    raise RuntimeError('at the end')\n"
        "RuntimeError: at the end\n"
    ]


@pytest.mark.slow
def test_the_process_is_left_as_the_script_would_find_it(tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text(
        "import os, sys\n"
        "print('greenroom.sim' in sys.modules, os.environ.get('OMP_NUM_THREADS'), sys.argv[1:])\n"
        "sys.exit(5)\n",
        encoding="utf-8",
    )
    code, out, _ = run(
        [*GREENROOM, "-m"], "module", "--simulate", "-m", cwd=tmp_path, OMP_NUM_THREADS="7"
    )
    assert (code, out.strip()) == (5, "False 7 ['--simulate', '-m']")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["nowhere.py"], "there is no script 'nowhere.py'"),
        (["--devices", "2", "script.py"], "name it with --simulate"),
        (["--capacity", "8GiB", "script.py"], "name it with --simulate"),
        (["--simulate", "rtx-1", "script.py"], "no profile is called 'rtx-1'"),
        (["--simulate", "h200", "--capacity", "plenty", "script.py"], "'plenty' is no size"),
    ],
)
def test_wrong_usage_is_refused_before_the_script_runs(
    arguments: list[str], reason: str, greenroom_command: Command
) -> None:
    Path("script.py").write_text("open('it_ran', 'w')", encoding="utf-8")
    done = greenroom_command("exec", *arguments)
    assert (done.code, done.out) == (2, "")
    (line,) = done.err.splitlines()
    assert line.startswith("greenroom: ") and reason in line
    assert not Path("it_ran").exists()


def test_both_ways_to_call_it_are_the_same_and_say_how_to_use_it(tmp_path: Path) -> None:
    script = str(Path(sys.executable).with_name("greenroom"))
    for command in ([script], [sys.executable, "-m", "greenroom"]):
        code, out, err = run(command, "--help", cwd=tmp_path)
        assert (code, err) == (0, "")
        assert all(f"\n  {name} " in out for name in ("run", "demo", "exec", "doctor"))
        assert run(command, "no-such-command", cwd=tmp_path)[0] == 2
        assert run(command, "--version", cwd=tmp_path)[1].startswith("greenroom 0.")
