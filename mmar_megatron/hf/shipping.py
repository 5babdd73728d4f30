"""The code that ships with exported weights: files of this package, which import each other and what comes with torch and
transformers, and nothing else. In an export they lie side by side.
"""

from __future__ import annotations

import re
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
SHIPPED = (
    *("hf/configuration_mmar.py", "hf/modeling_mmar.py", "hf/processing_mmar.py"),
    *("model/head.py", "model/key_values.py", "model/rotary.py", "model/vision.py"),
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


def rewritten(source: str) -> str:
    """With imports from this package as of files in the same directory."""
    return _IMPORT.sub(r"from .\1 import ", source)
