"""Whether a candidate keeps to what it has to: verdicts on counts, told apart from chance; pure.

All three gates ask the same question: if the candidate were just at its limit, how likely would so many bad ones among
so many be, or more? Below a level it is a breach. The gates are looked at again and again while a step lasts, and while
it waits for samples, so the level is strict meanwhile: what shows early must be plain, such as a candidate that fails
everything. Once, at the end of the step with all samples there, the usual level holds.

Requests that are never answered are no failures that a model tells of, and callers may take theirs back whatever the
version: they count against the candidate where it loses more of them than the stable version does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from aiorch_server.deployments.samples import Window
from aiorch_server.registry.records import Gates

EARLY_LEVEL = 0.001
FINAL_LEVEL = 0.05
#: Of answers, slower than their p99.
_BEYOND_P99 = 0.01
#: So many more of its requests than of the stable version's may a candidate lose where no error rate is given.
_MORE_LOST = 0.01
#: Nothing has come back for so long, or for so many times the slowest answer of either version: it hangs.
STUCK_S = 10.0
_STUCK_TIMES = 4.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """``breach``: what was breached, in a sentence with numbers, "" if nothing. ``missing``: what there are not enough
    samples of to say more, "" if there are. ``is_stuck``: what is missing are requests that do not come back.
    """

    breach: str = ""
    missing: str = ""
    is_stuck: bool = False


def find_tail(bad: int, total: int, rate: float) -> float:
    """How likely ``bad`` or more of ``total`` are, if each is bad with probability ``rate``. Exact (binomial).

    Of nothing anything may be said: counts that cannot be tell nothing.
    """
    if bad <= 0 or total <= 0:
        return 1.0
    if bad > total or rate <= 0.0:
        return 0.0
    if rate >= 1.0 or bad <= total * rate:
        return 1.0  # not above what is to be expected: how far below is of no interest
    term = math.exp(
        math.lgamma(total + 1)
        - math.lgamma(bad + 1)
        - math.lgamma(total - bad + 1)
        + bad * math.log(rate)
        + (total - bad) * math.log1p(-rate)
    )
    tail = 0.0
    for count in range(bad, total + 1):
        tail += term
        if term <= tail * 1e-12:
            break
        term *= (total - count) / (count + 1) * rate / (1.0 - rate)
    return min(tail, 1.0)


def judge(
    gates: Gates,
    stable: Window,
    candidate: Window,
    *,
    is_final: bool,
    can_stable_grow: bool,
    sampled: int,
    is_given_up: bool = False,
) -> Verdict:
    """The verdict on the candidate's window against the stable version's.

    ``is_final``: at the end of the step; ``is_given_up``: no more samples are waited for. ``can_stable_grow``: the
    stable version still gets requests; if not, its latency is not waited for. ``sampled`` is the share of requests that
    are compared, in hundredths of a percent.
    """
    missing = _find_missing(gates, stable, candidate, can_stable_grow, sampled)
    level = FINAL_LEVEL if is_given_up or (is_final and not missing) else EARLY_LEVEL
    for breach in (
        _judge_stuck(stable, candidate, is_given_up),
        _judge_errors(gates, candidate, level),
        _judge_lost(gates, stable, candidate, level),
        _judge_agreement(gates, candidate, level),
        _judge_latency(gates, stable, candidate, level),
    ):
        if breach:
            return Verdict(breach)
    if candidate.stuck_s >= max(1.0, 2.0 * candidate.slowest_s):
        return Verdict(missing=f"nothing has come back for {candidate.stuck_s} s of what is under way", is_stuck=True)
    return Verdict(missing=missing)


def _judge_stuck(stable: Window, candidate: Window, is_given_up: bool) -> str:
    if is_given_up and candidate.lost and not candidate.requests:
        return f"none of its {candidate.lost} requests was answered"
    if candidate.stuck_s < max(STUCK_S, _STUCK_TIMES * max(stable.slowest_s, candidate.slowest_s)):
        return ""
    return f"it hangs: nothing has come back for {candidate.stuck_s} s, with requests under way"


def _judge_lost(gates: Gates, stable: Window, candidate: Window, level: float) -> str:
    if gates.max_error_rate is None and gates.max_p99_ratio is None and gates.min_agreement is None:
        return ""
    more = _MORE_LOST if gates.max_error_rate is None else gates.max_error_rate
    total, stable_total = candidate.lost + candidate.requests, stable.lost + stable.requests
    limit = min(1.0, _bound_rate(stable.lost, stable_total, level) + more)
    if find_tail(candidate.lost, total, limit) >= level:
        return ""
    return (
        f"{candidate.lost} of {total} requests were not answered ({candidate.lost / total:.2%}; "
        f"of the stable version's {stable.lost} of {stable_total})"
    )


def _bound_rate(bad: int, total: int, level: float) -> float:
    """The largest rate that so many of so many are likely for (Wilson's bound); 1 with none to tell."""
    if not total:
        return 1.0
    z, rate = (3.1 if level < FINAL_LEVEL else 1.65), bad / total
    spread = z * math.sqrt(rate * (1.0 - rate) / total + z * z / (4.0 * total * total))
    return min(1.0, (rate + z * z / (2.0 * total) + spread) / (1.0 + z * z / total))


def _judge_errors(gates: Gates, candidate: Window, level: float) -> str:
    limit = gates.max_error_rate
    if limit is None or find_tail(candidate.errors, candidate.requests, limit) >= level:
        return ""
    return (
        f"{candidate.errors} of {candidate.requests} requests failed ({candidate.errors / candidate.requests:.2%}, "
        f"at most {limit:.2%} may)"
    )


def _judge_agreement(gates: Gates, candidate: Window, level: float) -> str:
    limit, differed = gates.min_agreement, candidate.compared - candidate.agreed
    if limit is None or find_tail(differed, candidate.compared, 1.0 - limit) >= level:
        return ""
    return (
        f"{candidate.agreed} of {candidate.compared} compared answers agree "
        f"({candidate.agreed / candidate.compared:.2%}, at least {limit:.2%} must)"
    )


def _judge_latency(gates: Gates, stable: Window, candidate: Window, level: float) -> str:
    limit = gates.max_p99_ratio
    if limit is None or min(stable.answers, candidate.answers) < max(gates.min_samples, 1):
        return ""
    slow = candidate.count_slower(limit * _bound_p99_ns(stable, level))
    if find_tail(slow, candidate.answers, _BEYOND_P99) >= level:
        return ""
    p99_ms, stable_ms = candidate.quantile_ns(0.99) / 1e6, stable.quantile_ns(0.99) / 1e6
    ratio = p99_ms / max(stable_ms, 1e-6)
    return (
        f"its p99 is {p99_ms:.3g} ms, {ratio:.3g} times the {stable_ms:.3g} ms of the stable version "
        f"(at most {limit:g} times; {candidate.answers} and {stable.answers} answers)"
    )


def _bound_p99_ns(stable: Window, level: float) -> int:
    """The stable version's p99 at the upper end of what its answers allow; with few answers, the slowest of them."""
    total = stable.answers
    allowed = total * _BEYOND_P99
    # so many slower ones that fewer would be a surprise: two-sided to the test of the candidate, normal is near enough
    slower = max(0, math.floor(allowed - (3.1 if level < FINAL_LEVEL else 1.0) * math.sqrt(allowed)))
    return stable.quantile_ns((total - slower) / total)


def _find_missing(gates: Gates, stable: Window, candidate: Window, can_stable_grow: bool, sampled: int) -> str:
    wanted = max(gates.min_samples, 1)
    if (gates.max_error_rate is not None or gates.max_p99_ratio is not None) and candidate.requests < wanted:
        return f"the candidate has answered {candidate.requests} of the {wanted} requests that are needed"
    if gates.max_p99_ratio is not None and candidate.answers < wanted:
        return f"the candidate has answered {candidate.answers} of the {wanted} requests that are needed"
    if gates.max_p99_ratio is not None and stable.answers < wanted and can_stable_grow:
        return f"the stable version has answered {stable.answers} of the {wanted} requests that are needed"
    if gates.min_agreement is not None:
        least = max(1, math.ceil(wanted * sampled / 10_000))
        if candidate.compared < least:
            return f"{candidate.compared} of the {least} answers that are needed were compared"
    return ""
