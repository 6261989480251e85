"""How sparse a model is at each step of training."""

from __future__ import annotations


def cubic_sparsity(
    step: int, *, final: float, initial: float = 0.0, begin: int = 0, end: int = 1, every: int = 1
) -> float:
    """The sparsity after training step `step`: fast at first, when there is much to take away, slow at the end.

    s_t = s_f + (s_i - s_f) (1 - (t - t_0) / (n Δt))³ for t in t_0, t_0 + Δt, ..., t_0 + n Δt
    with s_i, s_f: initial, final; t_0: begin; n Δt: end - begin; Δt: every. Between two of these it stays; before
    begin it is `initial`, from end on it is `final`, also where `every` doesn't divide end - begin.
    Zhu & Gupta 2017, "To prune, or not to prune", equation 1. Raises ValueError if end is before begin.
    """
    if end < begin or every < 1:
        raise ValueError(f"a schedule can't go from step {begin} to step {end} every {every} steps")
    if step >= end:
        return final
    if step < begin:
        return initial
    done = (step - begin) // every * every / (end - begin)
    return final + (initial - final) * (1 - done) ** 3
