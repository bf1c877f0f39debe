"""In which order arms are timed, so that heat and drift fall on all alike."""

import random


def balanced_rounds(arms: int, rounds: int, seed: int) -> list[tuple[int, ...]]:
    """Rounds in which every arm runs once, in a balanced order.

    Rows of a Williams square (Williams 1949), each followed by its reverse. After every second
    round each arm has run as often before as after each other one; after ``2 * arms`` rounds each
    has also followed each other one directly equally often.

    Args:
        arms: how many there are.
        rounds: how many to lay out.
        seed: of the order of rows, and of which arm takes which place in them.
    """
    draw = random.Random(seed)  # noqa: S311 - an experiment's order is no secret
    # 0, 1, n-1, 2, n-2, ...: the steps between neighbours are all different.
    first = [(place + 1) // 2 if place % 2 else -(place // 2) for place in range(arms)]
    labels = draw.sample(range(arms), arms)
    order: list[tuple[int, ...]] = []
    while len(order) < rounds:
        for shift in draw.sample(range(arms), arms):
            row = tuple(labels[(step + shift) % arms] for step in first)
            order += [row, row[::-1]]
    return order[:rounds]
