"""What the opener of all checkpoints promises to a type checker."""

import subprocess
import sys

SNIPPET = """
from ddim import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("fashion-mnist")
reveal_type(pipe)
reveal_type(pipe.to("cpu"))
reveal_type(pipe.save_pretrained("folder"))
reveal_type(pipe.scheduler)
reveal_type(pipe.warm_up)
pipe.save_pretrained()
"""

# Only the list of public names and the opener are read: torch alone would take minutes.
CONFIG = """
[mypy]
follow_imports = skip
ignore_missing_imports = true
[mypy-ddim,ddim.pipelines.diffusion_pipeline]
follow_imports = silent
"""


def test_an_opened_pipeline_is_known_to_mypy_and_not_any(tmp_path):
    (tmp_path / "snippet.py").write_text(SNIPPET)
    (tmp_path / "mypy.ini").write_text(CONFIG)
    run = subprocess.run(
        [sys.executable, "-m", "mypy", "--no-error-summary", "snippet.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    lines = [line.partition(": ")[2] for line in run.stdout.splitlines() if "snippet" in line]
    kind = "ddim.pipelines.diffusion_pipeline.DiffusionPipeline"
    expected = [f'note: Revealed type is "{what}"' for what in (kind, kind, "None", "Any", "Any")]
    assert lines[:5] == expected, run.stdout + run.stderr
    assert "error: Missing positional argument" in lines[5]
