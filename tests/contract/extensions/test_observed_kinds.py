"""Timing, slow log and traces of every kind of model, through every door and over each transport."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import tritonclient.grpc as grpc_client
from observed_calls import PARENT, Caller, make_headers, make_trace, write_observed
from otlp_receiver import Receiver, receive_spans
from sequence_models import WAIT, StatefulSite, write_tally
from served import Served, serve

TIMEOUT_S = 20.0
TRANSPORTS = {"threads": ("--io-threads", "1"), "loop": ("--io-threads", "0"), "grpcio": ("--transport", "grpcio")}
PHASES = {"queue", "batch_wait", "compute_input", "infer", "compute_output", "total"}
STEPS = ["compute_input", "compute_output", "infer", "queue"]
KINDS = {
    "plain": ("identity", "inference.GRPCInferenceService/ModelInfer"),
    "stream": ("identity", "inference.GRPCInferenceService/ModelStreamInfer"),
    "http": ("identity", "POST /v2/models/identity/infer"),
    "generate": ("identity", "POST /v2/models/identity/generate"),
    "oldest": ("oldest", "inference.GRPCInferenceService/ModelInfer"),
    "direct": ("direct", "inference.GRPCInferenceService/ModelInfer"),
    "ensemble": ("chain", "inference.GRPCInferenceService/ModelInfer"),
    "cached": ("cached", "inference.GRPCInferenceService/ModelInfer"),
    "caller": ("caller", "inference.GRPCInferenceService/ModelInfer"),
    "decoupled": ("repeat", "inference.GRPCInferenceService/ModelStreamInfer"),
    "decoupled_chain": ("repeat_chain", "inference.GRPCInferenceService/ModelStreamInfer"),
    "decoupled_http": ("repeat", "POST /v2/models/repeat/generate_stream"),
    "decoupled_one": ("repeat", "POST /v2/models/repeat/generate"),
    "serving": ("identity", "tensorflow.serving.PredictionService/Predict"),
    "serving_http": ("identity", "POST /v1/models/identity:predict"),
}
BAD_PARENTS = (
    "",
    "nonsense",
    "00-" + "0" * 32 + f"-{PARENT}-01",
    f"00-{make_trace(7)}-" + "0" * 16 + "-01",
    f"ff-{make_trace(7)}-{PARENT}-01",
    f"00-{make_trace(7).upper().replace('7', 'F')}-{PARENT}-01",
    f"00-{make_trace(7)}-{PARENT}-01-more",
    f"00-{make_trace(7)}-{PARENT}-1",
    "00-" * 400,
)


@dataclass
class Observed:
    """A server that runs, and what it has told: ``timing`` by kind, traces by their ids."""

    served: Served
    caller: Caller
    receiver: Receiver
    timing: dict[str, dict[str, str]]
    traces: dict[str, str]
    unsampled: dict[str, str]

    def spans(self, trace: str) -> list[Any]:
        return [span for span in list(self.receiver.spans) if span.trace_id.hex() == trace]

    def lines(self, trace: str) -> list[dict[str, Any]]:
        return [line for line in read_lines(self.served.log) if line.get("trace_id") == trace]

    def wait_for(self, traces: dict[str, str], *, has_spans: bool = True) -> None:
        """Until the slow log and the receiver know of them."""
        wait_until(lambda: not self.missing_lines(traces), lambda: self.missing_lines(traces))
        if has_spans:
            wait_until(lambda: not self.missing_spans(traces), lambda: self.missing_spans(traces))

    def missing_lines(self, traces: dict[str, str]) -> set[str]:
        there = {(line["trace_id"], line["model"]) for line in read_lines(self.served.log)}
        return {kind for kind, trace in traces.items() if (trace, KINDS[kind][0]) not in there}

    def missing_spans(self, traces: dict[str, str]) -> set[str]:
        there = {span.trace_id.hex() for span in list(self.receiver.spans) if span.parent_span_id.hex() == PARENT}
        return {kind for kind, trace in traces.items() if trace not in there}

    def server_span(self, kind: str) -> Any:
        (span,) = (each for each in self.spans(self.traces[kind]) if each.parent_span_id.hex() == PARENT)
        return span


def read_records(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{") and line.endswith("}")]


def read_lines(log: Path) -> list[dict[str, Any]]:
    return [line for line in read_records(log) if line["message"] == "slow request"]


def wait_until(is_true: Callable[[], bool], describe: Callable[[], object]) -> None:
    until = time.monotonic() + TIMEOUT_S
    while not is_true():
        assert time.monotonic() < until, describe()
        time.sleep(0.02)


@pytest.fixture(scope="module", params=TRANSPORTS)
def observed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Observed]:
    """Each kind of request was sent twice, once by a caller who samples; all that can be told of them was."""
    models = write_observed(tmp_path_factory.mktemp("observed"))
    options = ["--log-format", "json", "--log-slow-us", "1", "--set", "log_slow_lines_per_s=1000", "--cache", "local"]
    with receive_spans() as (endpoint, receiver):
        options += ["--trace-endpoint", endpoint, "--trace-rate", "0", *TRANSPORTS[request.param]]
        with serve(models, *options) as served:
            caller = Caller(served.grpc, served.http)
            calls = caller.calls()
            calls["cached"]({})  # is answered by the model, the next ones are not
            traces = {kind: make_trace(100 + index) for index, kind in enumerate(calls)}
            unsampled = {kind: make_trace(200 + index) for index, kind in enumerate(calls)}
            timing = {kind: call(make_headers(traces[kind])) for kind, call in calls.items()}
            for kind, call in calls.items():
                call(make_headers(unsampled[kind], is_sampled=False))
            sight = Observed(served, caller, receiver, timing, traces, unsampled)
            sight.wait_for(traces)
            sight.wait_for(unsampled, has_spans=False)
            yield sight
            caller.close()
            assert served.end() == 0
            assert list_failures(served.log) <= {
                "caller:1: a batch failed",
                "model 'caller': execute failed (failure 1)",
            }


def attributes_of(span: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in span.attributes}


def children_of(spans: list[Any], parent: Any) -> list[Any]:
    return sorted((span for span in spans if span.parent_span_id == parent.span_id), key=lambda span: span.name)


def names(spans: list[Any]) -> list[str]:
    return [span.name for span in spans]


@pytest.mark.parametrize("kind", KINDS)
def test_the_phases_come_with_the_answer(observed: Observed, kind: str) -> None:
    timing = {name: float(value) for name, value in observed.timing[kind].items()}
    assert timing["model_version"] == 1
    if kind == "cached":
        assert timing.keys() == {"cache_hit", "total", "model_version"} and timing["total"] >= timing["cache_hit"] > 0
        return
    assert timing.keys() - {"batch_size"} == {*PHASES, "model_version"}
    assert timing["total"] >= sum(timing[phase] for phase in PHASES - {"total"}) - 1.0
    assert kind in ("ensemble", "decoupled_chain") or timing["batch_size"] == 1


@pytest.mark.parametrize("kind", KINDS)
def test_each_is_one_server_span_below_its_caller(observed: Observed, kind: str) -> None:
    model, name = KINDS[kind]
    span = observed.server_span(kind)
    assert (span.name, span.kind, span.status.code) == (name, 2, 0)
    assert attributes_of(span)["aiorch.model.name"] == model
    below = children_of(observed.spans(observed.traces[kind]), span)
    for child in below:
        assert span.start_time_unix_nano <= child.start_time_unix_nano <= child.end_time_unix_nano
        assert child.end_time_unix_nano <= span.end_time_unix_nano
    expected = {"ensemble": ["infer cached", "infer identity"], "cached": ["cache_hit"]}
    expected["decoupled_chain"] = ["infer identity", "infer identity", "infer repeat"]
    expected["caller"] = [*STEPS[:2], "infer", "infer chain", "queue"]
    assert names(below) == expected.get(kind, STEPS)


def test_steps_and_calls_hang_below_who_caused_them(observed: Observed) -> None:
    spans = observed.spans(observed.traces["caller"])
    (chain,) = (span for span in spans if span.name == "infer chain")
    steps = children_of(spans, chain)
    assert names(steps) == ["infer cached", "infer identity"]
    assert all(names(children_of(spans, step)) == STEPS for step in steps)
    (hit,) = children_of(observed.spans(observed.traces["cached"]), observed.server_span("cached"))
    assert attributes_of(hit) == {"aiorch.cache.shared": False}


@pytest.mark.parametrize("kind", ["decoupled", "decoupled_chain", "decoupled_http", "decoupled_one"])
def test_a_stream_is_one_span_with_an_event_for_each_answer(observed: Observed, kind: str) -> None:
    span = observed.server_span(kind)
    errors = [attributes_of(event)["aiorch.response.is_error"] for event in span.events]
    assert errors == ([False] if kind == "decoupled_one" else [False, True, False])
    assert {event.name for event in span.events} == {"response"}
    assert attributes_of(span)["aiorch.responses"] == len(errors)
    times = [event.time_unix_nano for event in span.events]
    assert times == sorted(times)
    assert span.start_time_unix_nano <= times[0] and times[-1] <= span.end_time_unix_nano


@pytest.mark.parametrize("kind", KINDS)
def test_the_slow_logs_line_has_the_ids_of_its_request(observed: Observed, kind: str) -> None:
    """Of the server's span where it is traced, else of its caller's, who has decided against it."""
    model = KINDS[kind][0]
    (line,) = (each for each in observed.lines(observed.traces[kind]) if each["model"] == model)
    assert line["span_id"] == observed.server_span(kind).span_id.hex()
    assert line["status"] == 0 and line["total_us"] >= 1.0
    (line,) = (each for each in observed.lines(observed.unsampled[kind]) if each["model"] == model)
    assert line["span_id"] == PARENT
    assert ("cache_hit_us" in line) == (kind == "cached")
    assert observed.spans(observed.unsampled[kind]) == []


def test_a_steps_line_has_the_ids_of_the_whole_request(observed: Observed) -> None:
    for kind, models in (
        ("ensemble", {"chain", "identity", "cached"}),
        ("caller", {"caller", "chain", "identity", "cached"}),
    ):
        lines = observed.lines(observed.traces[kind])
        assert {line["model"] for line in lines} == models and len(lines) == len(models)
        assert {line["span_id"] for line in lines} == {observed.server_span(kind).span_id.hex()}


def list_failures(log: Path) -> set[str]:
    return {line["message"] for line in read_records(log) if line["level"] == "ERROR"}


def test_a_failure_is_logged_with_the_ids_of_its_request(observed: Observed) -> None:
    with pytest.raises(grpc.RpcError, match="below zero"):
        observed.caller.infer("caller", make_headers(make_trace(500), is_sampled=False), -1.0)

    def list_told() -> list[dict[str, Any]]:
        return [line for line in read_records(observed.served.log) if line["message"] == "caller:1: a batch failed"]

    wait_until(lambda: bool(list_told()), lambda: list_failures(observed.served.log))
    (line,) = list_told()
    assert (line["trace_id"], line["span_id"]) == (make_trace(500), PARENT) and "ValueError: below zero" in line[
        "trace"
    ]


@pytest.mark.parametrize("kind", ["plain", "stream", "http", "generate", "decoupled_http", "serving", "serving_http"])
def test_a_malformed_parent_is_no_parent(observed: Observed, kind: str) -> None:
    call = observed.caller.calls()[kind]
    for text in BAD_PARENTS:
        timing = call({"traceparent": text, "aiorch-timing": "1"})
        assert float(timing["total"]) > 0
    assert observed.lines(make_trace(7)) == [] and observed.spans(make_trace(7)) == []


def test_settings_change_while_it_runs(observed: Observed) -> None:
    """For requests at each door: no span while that is off, lines in the other format, and all as before after that."""
    calls = observed.caller.calls()
    off = {kind: make_trace(300 + index) for index, kind in enumerate(calls)}
    on = {kind: make_trace(400 + index) for index, kind in enumerate(calls)}
    client = grpc_client.InferenceServerClient(observed.served.grpc)
    try:
        client.update_trace_settings(settings={"trace_level": ["OFF"]})
        client.update_log_settings({"log_format": "text"})
        for kind, call in calls.items():
            assert float(call(make_headers(off[kind]))["total"]) > 0

        def list_untold() -> list[str]:
            log = observed.served.log.read_text()
            return [kind for kind in off if f"trace_id={off[kind]} span_id={PARENT}" not in log]

        wait_until(lambda: not list_untold(), list_untold)
    finally:
        client.update_trace_settings(settings={"trace_level": None})
        client.update_log_settings({"log_format": "default"})
        client.close()
    for kind, call in calls.items():
        call(make_headers(on[kind]))
    observed.wait_for(on)
    assert [kind for kind in off if observed.spans(off[kind]) or observed.lines(off[kind])] == []


@pytest.fixture
def stateful(tmp_path: Path) -> Iterator[tuple[StatefulSite, Caller, Receiver]]:
    """A server in this process, whose models can be held."""
    (tmp_path / "models").mkdir()
    write_tally(tmp_path / "models", "oldest")
    write_tally(tmp_path / "models", "direct", strategy="direct { max_queue_delay_microseconds: 0 }")
    with receive_spans() as (endpoint, receiver):
        site = StatefulSite(tmp_path / "models", trace={"endpoint": endpoint, "rate": 0})
        caller = Caller(site.target, site.http)
        try:
            yield site, caller, receiver
        finally:
            caller.close()
            site.close()


@pytest.mark.parametrize("model", ["oldest", "direct"])
def test_the_wait_for_its_turn_is_the_queue(stateful: tuple[StatefulSite, Caller, Receiver], model: str) -> None:
    """A request behind another of its sequence has waited since it came; one that never ran has only waited."""
    site, caller, receiver = stateful
    with ThreadPoolExecutor(4) as pool, site.held(model) as release:
        first = pool.submit(caller.step, model, make_headers(make_trace(1)), WAIT, 7)
        site.wait_for(lambda: site.table(model).live == 1)
        second = pool.submit(caller.step, model, make_headers(make_trace(2)), 1, 7, is_start=False)
        site.wait_count(model, waiting=1)
        with pytest.raises(grpc.RpcError) as refused:  # given up in its turn
            caller.step(model, make_headers(make_trace(3)), 1, 7, is_start=False, timeout_s=0.1)
        assert refused.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        release()
        first.result(TIMEOUT_S)
        timing = {name: float(value) for name, value in second.result(TIMEOUT_S).items()}
    assert timing["queue"] >= 100_000 * 0.9 and timing["total"] >= timing["queue"] + timing["infer"]
    spans = receiver.wait(lambda found: sum(span.parent_span_id.hex() == PARENT for span in found) == 3)
    (given_up,) = (
        span for span in spans if span.trace_id.hex() == make_trace(3) and span.parent_span_id.hex() == PARENT
    )
    assert given_up.status.code == 2 and names(children_of(spans, given_up)) == ["queue"]


def test_a_composed_batch_is_linked_to_its_members(stateful: tuple[StatefulSite, Caller, Receiver]) -> None:
    site, caller, receiver = stateful
    with ThreadPoolExecutor(4) as pool, site.held("direct") as release:
        pool.submit(caller.step, "direct", {}, WAIT)
        site.wait_for(lambda: site.table("direct").live == 1)
        waiting = [pool.submit(caller.step, "direct", make_headers(make_trace(n)), n) for n in (1, 2)]
        site.wait_count("direct", live=3)
        release()
        timing = [each.result(TIMEOUT_S) for each in waiting]
    assert timing[0]["infer"] == timing[1]["infer"]  # one run
    spans = receiver.wait(lambda found: any(span.name == "batch direct" for span in found))
    (batch,) = (span for span in spans if span.name == "batch direct")
    members = [span for span in spans if span.parent_span_id.hex() == PARENT]
    assert {link.span_id for link in batch.links} == {span.span_id for span in members} and len(members) == 2
    assert attributes_of(batch)["aiorch.batch.members"] == 2


def test_a_step_is_no_request_of_its_own(tmp_path: Path) -> None:
    """Not even a decoupled one, where its ensemble is not traced."""
    whole, after = make_trace(1), make_trace(2)
    write_observed(tmp_path, "identity", "repeat", "repeat_chain")
    with receive_spans() as (endpoint, receiver):
        site = StatefulSite(tmp_path, trace={"endpoint": endpoint, "rate": 0})
        caller, client = Caller(site.target, site.http), grpc_client.InferenceServerClient(site.target)
        try:
            client.update_trace_settings(model_name="repeat_chain", settings={"trace_level": ["OFF"]})
            for model, trace in (("repeat_chain", whole), ("repeat", after)):
                caller.stream(model, {"traceparent": make_headers(trace)["traceparent"]}, 1.0)
            spans = receiver.wait(lambda found: any(span.trace_id.hex() == after for span in found))
            assert [span.name for span in spans if span.trace_id.hex() == whole] == []
        finally:
            client.close()
            caller.close()
            site.close()
