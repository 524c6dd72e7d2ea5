"""Rewards short completions."""


def length(completion_ids: list[list[int]], target: int, limit: int) -> list[float]:
    """Earns 0 for up to `target` tokens, -1 from `limit` tokens, and between them on the line: -(n - target) / (limit -
    target)."""
    if not 0 <= target < limit:
        raise ValueError(f"target={target} must be 0 or more, and less than limit={limit}")
    return [-min(max(len(ids) - target, 0) / (limit - target), 1.0) for ids in completion_ids]
