"""Settings of Sphinx: `sphinx-build -W docs site` builds the pages."""

import inspect
import shutil
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import phi3_jax  # noqa: E402

# Pages link to the notebooks, which lie outside of this folder.
shutil.copytree(
    ROOT / "examples",
    ROOT / "docs" / "examples",
    ignore=shutil.ignore_patterns("*.py", "README.md", ".ipynb_checkpoints"),
    dirs_exist_ok=True,
)

project = "phi3-jax"
copyright = "the authors of phi3-jax"
release = version = phi3_jax.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = "phi3-jax"
html_static_path = ["_static"]
html_css_files = ["wide.css"]

# Docstrings have code in single backticks, as Markdown does.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_custom_sections = [("Further options", "params_style")]

myst_heading_anchors = 3
nb_execution_mode = "off"  # the notebooks are stored with their outputs, which tests compare

# The button copies the commands of a block without their prompts and outputs.
copybutton_prompt_text = r"\$ |> "
copybutton_prompt_is_regexp = True
copybutton_line_continuation_character = "\\"


def constructor_signature(
    app: Any, what: str, name: str, member: Any, options: Any, signature: str, returns: str
) -> tuple[str, str] | None:
    """Returns the arguments of a module's `__init__`, which Flax's metaclass hides."""
    if what != "class" or signature != "(*args, **kwargs)":
        return None
    arguments = list(inspect.signature(member.__init__).parameters.values())[1:]
    plain = [argument.replace(annotation=inspect.Parameter.empty) for argument in arguments]
    return str(inspect.Signature(plain)), returns


def setup(app: Any) -> None:
    app.connect("autodoc-process-signature", constructor_signature)
