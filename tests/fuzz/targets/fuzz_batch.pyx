"""Target ``batch``: messages through a route into a queue, gathered, settled, answered, decoded: the whole short path.

The input is a row of messages, each behind two bytes that hold its size. Each that is taken is answered once, with its
own rows. Where a message ends with its tensor, every second one's lies elsewhere, as if received into a slab.
"""

from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.stddef cimport size_t
from libc.stdint cimport uint8_t
from libc.stdio cimport fprintf, stderr
from libc.stdlib cimport abort
from libc.string cimport memcmp, memcpy, memset

import traceback

import numpy as np

from aiorch_server._core.buffers cimport Place, drop_buffer, new_buffer
from aiorch_server._core.request cimport CompletionSink, Request, drain_sink, free_request, new_sink
from aiorch_server._core.routes cimport DISPATCHED, Router, RouterState, RouteReader, begin_round, dispatch, end_round
from aiorch_server._core.shares cimport RouteMark
from aiorch_server._core.wire cimport put_varint

from aiorch_server._core import Batch, ModelSpec, Scheduler, decode_response, scan
from aiorch_server.types import DataType, ModelSignature, TensorSpec

cdef enum:
    MAX_MESSAGES = 16


class Served:
    """One model behind a route; BYTES and numbers, one input optional, a batch dimension."""

    def __init__(self):
        inputs = (TensorSpec("X", DataType.FP32, (-1,)), TensorSpec("T", DataType.BYTES, (-1,), optional=True))
        outputs = (TensorSpec("Y", DataType.FP32, (-1,)), TensorSpec("T2", DataType.BYTES, (-1,)))
        self.scheduler = Scheduler(ModelSpec("m", 1, ModelSignature(inputs, outputs, 8)))
        self.batch = Batch(self.scheduler)
        self.router = Router()
        self.router.publish({"m": (1, {1: self.scheduler})})

    def run_all(self):
        """Takes batches until nothing is queued."""
        while self.scheduler.pending:
            assert self.scheduler.take(self.batch)
            rows = self.batch.rows
            found = self.batch.gather()
            assert len(found["X"]) == rows
            texts = found.get("T")
            assert texts is None or len(texts) == rows
            # every row of the second output says who its row of the first is
            marks = np.array([[row.tobytes()] for row in found["X"]], object).reshape(rows, 1)
            self.batch.settle({"Y": found["X"], "T2": marks})


served = Served()


def check_answer(message: bytes, status: int, response: bytes) -> None:
    assert status == 0, status
    name, version, id, outputs = decode_response(response[5:])
    asked = scan(message)
    assert (name, version, id) == ("m", "1", asked["id"].decode())
    mine = {tensor[0]: tensor for tensor in asked["inputs"]}[b"X"]
    found = {output[0]: output for output in outputs}
    assert set(found) <= {"Y", "T2"}
    assert {output.decode() for output in asked["outputs"]} in (set(), set(found))
    if "Y" in found:
        assert found["Y"][2] == mine[2] and bytes(found["Y"][3]) == mine[3]
    if "T2" in found:
        elements = bytes(found["T2"][3])
        size = len(mine[3]) // mine[2][0]
        rows = [mine[3][at * size:(at + 1) * size] for at in range(mine[2][0])]
        # numpy drops trailing zeros of BYTES no more than the core does
        assert elements == b"".join(len(row).to_bytes(4, "little") + row for row in rows)


cdef bint find_rest(const uint8_t *message, size_t size, Place *rest) noexcept nogil:
    """Where a tensor may begin that is the message's end, told by its tag and length; else the head does not parse."""
    cdef uint8_t expected[16]
    cdef size_t n
    expected[0] = 7 << 3 | 2
    rest.at = size
    while rest.at > 1:
        rest.at -= 1
        n = <size_t> (put_varint(expected + 1, size - rest.at) - expected)
        if rest.at > n and memcmp(message + rest.at - n, expected, n) == 0:
            return True
    return False


cdef object run_messages(const uint8_t *data, size_t size, CompletionSink *sink):
    cdef Request *taken[MAX_MESSAGES]
    cdef Request *request
    cdef RouteReader reader
    cdef Place rest
    cdef RouteMark mark
    cdef uint8_t *message
    cdef size_t length, own
    cdef int n = 0
    sent = {}
    reader.table = NULL
    reader.n_touched = 0
    begin_round((<Router> served.router).state, &reader)
    while size >= 2 and n < MAX_MESSAGES:
        length = min(data[0] | <size_t> data[1] << 8, size - 2)
        rest.buffer, own = NULL, length
        if n % 2 and find_rest(data + 2, length, &rest):
            own = rest.at
            rest.buffer = new_buffer(length - own, 0)
            rest.data = rest.buffer
            memcpy(rest.buffer, data + 2 + own, length - own)
        memset(&mark, 0, sizeof(RouteMark))
        message = new_buffer(own, 0)
        memcpy(message, data + 2, own)
        if dispatch(&reader, message, length, &rest, 1, 0, NULL, &mark, NULL, sink, <void *> served,
                    &request) == DISPATCHED:
            sent[<size_t> request] = PyBytes_FromStringAndSize(<const char *> data + 2, <Py_ssize_t> length)
        else:
            drop_buffer(message)
            drop_buffer(rest.buffer)
        n += 1
        data += 2 + length
        size -= 2 + length
    end_round(&reader)
    served.run_all()
    request = drain_sink(sink)
    while request != NULL:
        following = <size_t> request.next
        key, status = <size_t> request, request.status
        response = PyBytes_FromStringAndSize(<const char *> request.response, <Py_ssize_t> request.response_size)
        free_request(request)
        request = <Request *> <size_t> following
        check_answer(sent.pop(key), status, response)
    assert not sent, f"{len(sent)} of {n} messages were not answered"


cdef CompletionSink *sink = new_sink()


cdef int run_batch(const uint8_t *data, size_t size) noexcept with gil:
    try:
        run_messages(data, size, sink)
    except BaseException:
        traceback.print_exc()
        fprintf(stderr, "broken: the short path\n")
        abort()
    return 0


TARGETS = {"batch": <size_t> &run_batch}
