# The compiled module is private: csrc/bindings.cpp documents its functions.
from typing import Any

def __getattr__(name: str) -> Any: ...
