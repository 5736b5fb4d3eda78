from torch import Tensor

def search(
    x: Tensor,
    atoms: Tensor,
    heights: Tensor,
    threads: int,
    isa: str,
    index: Tensor,
    score: Tensor,
    first: int = 0,
    more: bool = False,
) -> None: ...
def search_lists(
    x: Tensor,
    atoms: Tensor,
    heights: Tensor,
    threads: int,
    isa: str,
    index: Tensor,
    score: Tensor,
    more: bool,
    starts: Tensor,
    names: Tensor,
    way: Tensor,
    bias: Tensor,
    guide: Tensor,
    limit: Tensor | None,
    ceiling: Tensor | None,
) -> int: ...
def search_narrow(
    x: Tensor,
    atoms: Tensor,
    heights: Tensor,
    threads: int,
    isa: str,
    index: Tensor,
    score: Tensor,
    narrow_x: Tensor,
    narrow_atoms: Tensor,
    bound: Tensor,
) -> None: ...
def quick(isa: str) -> bool: ...
def logsumexp(
    x: Tensor, atoms: Tensor, heights: Tensor, threads: int, isa: str, epsilon: float, out: Tensor
) -> None: ...
def available() -> list[str]: ...
