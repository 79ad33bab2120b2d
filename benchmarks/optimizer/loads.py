"""When requests come: the loads of the comparison, in parts of what the server can do at most."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from aiorch_server.optimizer.arrivals import OnOff, draw_day, draw_pieces, draw_poisson

#: By name: what it is, for the page.
LOADS: Final = {
    "poisson": "independent callers at 70 % of capacity",
    "bursts": "0.3 s at 160 % and 0.5 s at 20 % of capacity, in the mean and at random",
    "day": "a day from night to its peak of 110 % of capacity, 50 % in the mean",
    "step": "30 %, from the middle on 90 % of capacity",
}
#: What comes before it counts: at the load's first rate.
_FIRST: Final = {"poisson": 0.7, "bursts": 0.5, "day": 0.3, "step": 0.3}


def draw(load: str, capacity: float, ramp_s: float, seconds: float, seed: int) -> npt.NDArray[np.int64]:
    """Times in ns from the start of the ramp; the load itself begins with the ramp's end. The same by the same seed."""
    random = np.random.default_rng([seed, sorted(LOADS).index(load)])
    first = draw_poisson(_FIRST[load] * capacity, ramp_s, random)
    if load == "poisson":
        rest = draw_poisson(0.7 * capacity, seconds, random)
    elif load == "bursts":
        rest = OnOff(1.6 * capacity, 0.2 * capacity, 0.3, 0.5).draw(seconds, random)
    elif load == "day":
        rest = draw_day(0.5 * capacity, seconds, random, peak=2.2)
    else:
        rest = draw_pieces([(0.3 * capacity, seconds / 2), (0.9 * capacity, seconds / 2)], random)
    return np.concatenate([first, rest + round(ramp_s * 1e9)])


def draw_steady(rate: float, seconds: float, seed: int) -> npt.NDArray[np.int64]:
    """Poisson, for capacity and overload."""
    return draw_poisson(rate, seconds, np.random.default_rng([seed, 99]))
