"""The code that ships with exported weights: files of this package, which import each other and what comes with torch and
transformers, and nothing else. In an export they lie side by side.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
SHIPPED = (
    *("hf/configuration_mmar.py", "hf/modeling_mmar.py", "hf/processing_mmar.py"),
    *("model/head.py", "model/key_values.py", "model/rotary.py", "model/selection.py", "model/vision.py"),
    *("diffusion/conditional.py", "diffusion/parameterization.py", "diffusion/painting.py"),
    *("diffusion/sampler.py", "diffusion/schedule.py"),
    *("data/fitting.py", "data/patches.py"),
)
"""transformers finds those that the first three import themselves."""
AUTO_MAP = {
    "AutoConfig": "configuration_mmar.MMARConfig",
    "AutoModel": "modeling_mmar.MMARForCausalLM",
    "AutoModelForCausalLM": "modeling_mmar.MMARForCausalLM",
    "AutoProcessor": "processing_mmar.MMARProcessor",
}
"""What transformers' automatic classes stand for in an export."""
_IMPORT = re.compile(r"^from mmar_megatron\.(?:\w+\.)*(\w+) import ", flags=re.MULTILINE)


def shipped_code() -> dict[str, str]:
    """The files of an export: name -> source, in which imports of each other are relative, as transformers asks for."""
    return {Path(name).name: rewritten((PACKAGE / name).read_text()) for name in SHIPPED}


def stamped(code: Mapping[str, str]) -> dict[str, str]:
    """The same, with a comment in the first file that no other code has.

    In one process transformers keeps the model's class for each class of configuration: of two exports whose
    `configuration_mmar.py` were the same, the second would run the first's code.
    """
    first, *_ = code
    digest = hashlib.sha256("".join(code.values()).encode()).hexdigest()
    return {**code, first: f"{code[first]}\n# The code that this belongs to: {digest[:16]}\n"}


def rewritten(source: str) -> str:
    """With imports from this package as of files in the same directory."""
    return _IMPORT.sub(r"from .\1 import ", source)
