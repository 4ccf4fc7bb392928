"""The orders of torch's pipeline schedules, without stages to run them, and how they would run."""

from torch.distributed.pipelining.schedules import (
    ScheduleInterleaved1F1B,
    ScheduleZBVZeroBubble,
    _ComputationType,
)

KINDS = {"1f1b": ScheduleInterleaved1F1B, "interleaved": ScheduleInterleaved1F1B, "zbv": ScheduleZBVZeroBubble}
_ENDS = (_ComputationType.FULL_BACKWARD, _ComputationType.BACKWARD_WEIGHT)


def order(kind: str, pp: int, stages: int, micro_batches: int, rank: int) -> list:
    """What one rank computes, one after the other."""
    schedule = object.__new__(KINDS[kind])
    schedule.pp_group_size, schedule.n_local_stages, schedule._n_microbatches = pp, stages, micro_batches
    schedule._num_stages = schedule.num_stages = pp * stages
    schedule.microbatches_per_round = micro_batches // max(1, micro_batches // pp)
    return [action for action in schedule._calculate_single_rank_operations(rank) if action is not None]


def most_in_flight(actions: list) -> int:
    """The most forward passes that wait for their backward pass, that of weights where it is apart."""
    waiting = most = 0
    for action in actions:
        waiting += (action.computation_type is _ComputationType.FORWARD) - (action.computation_type in _ENDS)
        most = max(most, waiting)
    return most


def time_of_a_step(orders: list[list], stages: int, forward: float, inputs: float, weights: float) -> float:
    """When the last rank is ready, if passes of one of `stages` stages take so long, and handing over takes no time."""
    lasting = {
        _ComputationType.FORWARD: forward,
        _ComputationType.BACKWARD_INPUT: inputs,
        _ComputationType.BACKWARD_WEIGHT: weights,
        _ComputationType.FULL_BACKWARD: inputs + weights,
    }
    done: dict[tuple[str, int, int], float] = {}
    clocks, places = [0.0] * len(orders), [0] * len(orders)
    while any(place < len(actions) for place, actions in zip(places, orders, strict=True)):
        moved = False
        for rank, actions in enumerate(orders):
            while places[rank] < len(actions):
                action = actions[places[rank]]
                stage, batch, kind = action.stage_index, action.microbatch_index, action.computation_type
                if kind is _ComputationType.FORWARD:
                    needed = ("F", stage - 1, batch) if stage else None
                elif kind is _ComputationType.BACKWARD_WEIGHT:
                    needed = ("B", stage, batch)
                else:
                    needed = ("B", stage + 1, batch) if stage + 1 < stages else ("F", stage, batch)
                if needed is not None and needed not in done:
                    break
                clocks[rank] = max(clocks[rank], done.get(needed, 0.0) if needed else 0.0) + lasting[kind]
                name = {_ComputationType.FORWARD: "F", _ComputationType.BACKWARD_WEIGHT: "W"}.get(kind, "B")
                done[name, stage, batch] = clocks[rank]
                places[rank] += 1
                moved = True
        assert moved, "the orders wait for each other"
    return max(clocks)
