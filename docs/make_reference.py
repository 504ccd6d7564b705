"""Write docs/configuration.md from the code: every key of a configuration, its type, default and meaning."""

from pathlib import Path

from unisono.config import reference

HEAD = """# Configuration

Made from the code by `make docs`. A configuration is YAML; any key can be overridden on the command line,
`unisono train configs/lm.yaml layout.zero=0 schedule.name=linear`. Unknown keys are refused. Keys of `Trainer` in
Python are the same, but for `task`, `options`, `optimizer`, `steps` and `preload`, which it takes as objects, and the
section `validation`, which is the argument `validate={...}` there: its `validation=` is the dataset.

| key | type | default | meaning |
|---|---|---|---|
"""


def text() -> str:
    """The page."""
    rows = [f"| `{key}` | {kind} | {default} | {meaning} |" for key, kind, default, meaning in reference()]
    return HEAD + "\n".join(rows) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("configuration.md").write_text(text(), encoding="utf-8")
