"""The page's section about rollouts, and the figures of it that have goals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.tables import make_grid

Result = Mapping[str, Any]


def count_unfit(rollout: Result | None) -> float | None:
    """Requests during all swaps that failed, were lost, or were answered by a version that should not have."""
    found = _find(rollout, "swaps")
    return None if found is None else float(found["failed"] + found["lost"] + found["illegal"])


def find_p99_ratio(rollout: Result | None, name: str = "swaps") -> float | None:
    """The p99 during swaps divided by that between them."""
    found = _find(rollout, name)
    return None if found is None else float(found["p99_ratio"])


def find_share_error(rollout: Result | None) -> float | None:
    """By how many per cent of all requests the canary's share differs from what was asked."""
    found = _find(rollout, "weights")
    return None if found is None else abs(float(found["reached_percent"]) - float(found["percent"]))


def count_misjudged(rollout: Result | None) -> float | None:
    """Canaries that came to another end than they should, or cost the stable version an answer."""
    found = _find(rollout, "canaries")
    if found is None:
        return None
    return float(sum(not row["is_right"] or row["stable_failed"] + row["lost"] > 0 for row in found))


def find_access_percent(rollout: Result | None, shows: str, sent: str, against: str) -> float | None:
    """What a server that asks spends more on a request that shows ``shows``, sent so, than one that does not ask, to
    which ``against`` is shown.
    """
    found = _find(rollout, "access")
    if found is None:
        return None
    asked, base = _find_us(found, shows, sent, True), _find_us(found, against, sent, False)
    return None if asked is None or base is None else (asked / base - 1) * 100


def _find(rollout: Result | None, name: str) -> Any:
    return None if rollout is None or name not in rollout else rollout[name]["found"]


def _find_us(access: Result, shows: str, sent: str, is_asked: bool) -> float | None:
    for row in access["rows"]:
        if (row["shows"], row["sent"], row["is_asked"]) == (shows, sent, is_asked):
            return float(row["cpu_us"])
    return None


def render_rollout(rollout: Result) -> str:
    """The section as Markdown; what was not measured is left out."""
    parts = [
        "## Rollouts\n\nA server with a registry on SQLite has one core, its operator (the SDK's `AdminClient`) and "
        "the load the other. Models answer their input plus their version's number, so each answer tells whose it is."
    ]
    renderers = {
        "swaps": _render_swaps,
        "swaps-realtime": _render_realtime,
        "weights": _render_weights,
        "canaries": _render_canaries,
        "access": _render_access,
    }
    for name, render in renderers.items():
        if name in rollout:
            machine = rollout[name]["machine"]
            measured = f"(commit {machine['commit'] or 'unknown'}, {machine['date']})"
            parts.append(render(rollout[name]["found"], measured))
    return "\n\n".join(parts)


def _render_swaps(found: Result, measured: str) -> str:
    lasted = found["swap_ms"]
    return (
        f"**Swaps.** {found['swaps']} times a new version of an ONNX model takes the place of the one before "
        f"(strategy replace) under {found['offered_per_s']:,.0f} requests/s that come at random, whatever the server "
        f"does {measured}. A swap takes {lasted['p50']:,.0f} ms from the operator's request until it is known that "
        f"only the new version is left (median; at most {lasted['max']:,.0f} ms). Of {found['requests']:,} requests "
        f"{found['failed']} failed, {found['lost']} were lost, {found['illegal']} were answered by a version that "
        f"should not have; {found['versions']} versions answered. Latencies in microseconds, from when a request was "
        f"due; the load itself sent late by a p99 of {found['send_lag_us']['during_p99']:,.0f} and "
        f"{found['send_lag_us']['steady_p99']:,.0f}. The p99 during a swap is {found['p99_ratio']:.2f} times the other."
        "\n\n" + _show_latencies(found)
    )


def _render_realtime(found: Result, measured: str) -> str:
    return (
        f"**Swaps with precedence.** The same {found['swaps']} times with `--scheduling realtime`, which needs a "
        f"privilege {measured}: {found['swap_ms']['p50']:,.0f} ms (at most {found['swap_ms']['max']:,.0f}); of "
        f"{found['requests']:,} requests {found['failed']} failed, {found['lost']} were lost, {found['illegal']} were "
        f"answered by a version that should not have. The p99 during a swap is {found['p99_ratio']:.2f} times the "
        "other.\n\n" + _show_latencies(found)
    )


def _show_latencies(found: Result) -> str:
    rows = [
        [name, f"{marks['requests']:,}", *(f"{marks[key]:,.0f}" for key in ("p50_us", "p99_us", "p99.9_us", "max_us"))]
        for name, marks in (("during a swap", found["during"]), ("between swaps", found["steady"]))
    ]
    return make_grid(["requests", "count", "p50", "p99", "p99.9", "max"], rows)


def _render_weights(found: Result, measured: str) -> str:
    return (
        f"**Shares.** A canary of {found['percent']:g} % got {found['reached_percent']:.3f} % of "
        f"{found['requests']:,} requests, and of any {found['window']:,} answers one after the other between "
        f"{found['window_min_percent']:.1f} and {found['window_max_percent']:.1f} %; {found['failed']} failed "
        f"{measured}."
    )


def _render_canaries(found: list[Result], measured: str) -> str:
    rows = [
        [
            row["kind"],
            row["state"],
            f"{row['decided_s']:.2f}",
            f"{row['ended_s']:.2f}",
            f"{row['bake_s']:g}",
            str(row["stable_failed"] + row["lost"]),
            row["reason"].rpartition("%) to version")[2] or row["reason"],
        ]
        for row in found
    ]
    return (
        "**Canaries.** In steps of 10 % and 50 %, judged without a person by errors, p99 and agreement of answers; "
        f"seconds from the first step's begin {measured}. A good one has to keep to its gates for the whole time. "
        "*failed* counts requests of the stable version without a right answer.\n\n"
        + make_grid(["canary", "end", "decided", "ended", "bake time", "failed", "reason"], rows, numbers=False)
    )


def _render_access(found: Result, measured: str) -> str:
    rows = []
    for row in found["rows"]:
        if not row["is_asked"]:
            continue
        same = _find_us(found, row["shows"], row["sent"], False)
        # without a header there is nothing to index
        none = _find_us(found, "nothing", "indexed" if row["sent"] == "whole" else row["sent"], False)
        cells = [row["shows"], row["sent"]]
        for base in (none, same):
            cells += ["-", "-"] if base is None else [f"{base:.2f}", f"{(row['cpu_us'] / base - 1) * 100:+.1f} %"]
        rows.append([*cells[:2], f"{row['cpu_us']:.2f}", *cells[2:]])
    return (
        f"**Who may call.** The server's CPU microseconds per request, identity at {found['connections']}x1, median of "
        f"{found['turns']} turns of {found['requests']:,} requests {measured}: with `security:` on (roles, a quota; a "
        f"token of {found['token_bytes']} bytes signed with ES256, an API key, a client certificate), against a server "
        "that asks nobody, to which nothing, or the same, is shown. *indexed*: the header is sent once per connection, "
        "then as a number (grpc-go, grpc-java); *whole*: in each request (grpc's C core, and with it Python's and "
        "C++'s); *h2load* sends it whole and packed by Huffman's code.\n\n"
        + make_grid(["shown", "sent", "asked", "nothing shown", "more", "same shown", "more"], rows, names=2)
    )
