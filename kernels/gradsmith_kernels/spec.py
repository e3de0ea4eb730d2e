from dataclasses import dataclass
from typing import Any
@dataclass(frozen=True)
class CompileCase:
    name: str
    kernel: Any
    types: dict
    constants: dict
    aligned: tuple
    num_warps: int
