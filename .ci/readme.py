"""Runs what the README shows, in its order: shell blocks here, Python blocks in a folder with the four modules alone.

A text block right behind a shell block must be what the command prints, except for seconds. The text blocks under
"A prompt and its reply" must stand in what `--prompts` prints. `.ci/run` runs the doctests of the README.
"""
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile

root = pathlib.Path(__file__).resolve().parent.parent
readme = (root / "README.md").read_text("utf-8")
python = root / ".venv" / "bin" / "python"
blocks = re.findall(r"(?ms)^(.*?)^```(\w+)\n(.*?)^```$", readme)


def without_seconds(text):
    """The lines that do not depend on the machine."""
    lines = [line.rstrip() for line in text.strip().splitlines()]
    return [line for line in lines if not line.startswith("seconds")]


def shell(script):
    """The standard output of a shell block; what it left in the background is ended."""
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(["bash", "-ec", script], cwd=root, stdout=out, start_new_session=True)
        code = process.wait(timeout=1200)
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        out.seek(0)
        assert code == 0, script
        return out.read()


folder = pathlib.Path(tempfile.mkdtemp())
for name in ("billp.py", "envs.py", "prompts.py", "run.py"):
    shutil.copy(root / name, folder)
printed, prompts, heading, count = "", "", "", 0
for before, language, content in blocks:
    for title in re.findall(r"(?m)^## (.*)", before):
        heading = title
    if language == "sh" and "pytest" not in content:        # the tests have been run before
        printed = shell(content)
        count += 1
    elif language == "text" and not before.strip():
        assert without_seconds(printed) == without_seconds(content), f"printed now:\n{printed}"
        count += 1
    elif language == "text" and heading == "A prompt and its reply":
        flags = re.search(r"--show RUN (--pick \S+ --prompts)", before)
        if flags:                                           # before the first of these blocks
            run = re.search(r"^run +(\S+)", printed, re.M)[1]
            prompts = shell(f"{python} run.py --show {run} {flags[1]}")
        assert content.strip() in prompts, f"printed now:\n{prompts}"
        count += 1
    elif language == "python" and "server.py" in before:
        (root / "server.py").write_text(content)
    elif language == "python":
        subprocess.run([python, "-c", content], cwd=folder, check=True)
        count += 1
(root / "server.py").unlink(missing_ok=True)
shutil.rmtree(folder)
print(f"{count} passed, 0 failed")
sys.exit(0 if count >= 7 else 1)       # fewer: a block was not found
