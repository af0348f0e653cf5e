"""The queue of the server: nobody's answer is lost or another's, whatever the threads do; no network is involved."""

import threading
import time

import pytest

from unclip_jax.serving import queue


class Echo:
    """Draws nothing, but says what it was asked: `prompt/seed`. It waits where it is told to."""

    steps = ("prior", "decoder")

    def __init__(self):
        self.batches = []
        self.go = threading.Event()
        self.go.set()
        self.begun = threading.Semaphore(0)  # counts batches that wait at `go`

    def draw(self, prompts, seeds):
        self.batches.append(list(prompts))
        yield "z_i"
        self.begun.release()
        assert self.go.wait(20)
        if "bad" in prompts:
            raise MemoryError("no memory")
        yield [f"{prompt}/{seed}" for prompt, seed in zip(prompts, seeds, strict=True)]

    def png(self, pixels, prompt, seed):
        return pixels.encode()


@pytest.fixture
def model():
    return Echo()


def started(model, *, batch=4, places=8):
    line = queue.Queue(model, batch=batch, places=places)
    line.start()
    model.batches.clear()
    for _ in {1, batch}:
        model.begun.acquire()
    return line


def held(model, line):
    """Has the thread stand still with one request in hand, which is returned."""
    model.go.clear()
    first = line.submit("first", 0)
    assert model.begun.acquire(timeout=20)
    return first


def test_requests_are_drawn_in_order_in_full_batches_or_alone(model):
    line = started(model)
    first = held(model, line)
    others = [line.submit(f"{n}", n) for n in range(6)]
    assert [line.view(one)["position"] for one in others] == [1, 2, 3, 4, 5, 6]
    assert line.view(first)["step"] == {"number": 2, "of": 2, "part": "decoder"}
    model.go.set()
    for one in (first, *others):
        one.finished.result(20)
        assert line.find(one.id) is one and one.state == queue.DONE
        assert one.png == f"{one.prompt}/{one.seed}".encode()
    assert model.batches == [["first"], ["0", "1", "2", "3"], ["4"], ["5"]]
    assert line.health() == {"state": "ready", "waiting": 0, "places": 8, "drawing": 0, "drawn": 7, "failed": 0}


def test_no_more_wait_than_may_and_a_place_is_free_again(model):
    line = started(model, places=3)
    held(model, line)
    waiting = [line.submit("x", n) for n in range(3)]
    with pytest.raises(queue.Full) as refused:
        line.submit("x", 3)
    assert refused.value.seconds >= 1
    assert line.cancel(waiting[1]) and not line.cancel(waiting[1])
    assert waiting[1].state == queue.STOPPED and "taken back" in line.view(waiting[1])["error"]
    last = line.submit("last", 4)
    assert line.view(last)["position"] == 3
    model.go.set()
    last.finished.result(20)
    assert last.png == b"last/4" and model.batches[-1] == ["last"] and waiting[1].png == b""


def test_a_thousand_requests_of_fifty_threads_each_get_their_own(model):
    line = started(model, batch=8, places=30)
    held(model, line)
    wrong, refused = [], []

    def client(number):
        for n in range(20):
            prompt = f"{number} asks {n}"
            while True:
                try:
                    ticket = line.submit(prompt, n)
                    break
                except queue.Full:
                    refused.append(prompt)
                    model.go.set()
                    time.sleep(0.001)
            ticket.finished.result(30)
            if line.find(ticket.id).png != f"{prompt}/{n}".encode():
                wrong.append(prompt)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong and refused and line.health()["drawn"] == 1001
    assert {len(batch) for batch in model.batches} == {1, 8} and sum(map(len, model.batches)) == 1001


def test_what_cannot_be_drawn_is_said_and_the_next_is_drawn(model, caplog):
    line = started(model)
    bad = line.submit("bad", 0)
    bad.finished.result(20)
    assert bad.state == queue.FAILED and "MemoryError" in line.view(bad)["error"]
    assert "no memory" not in line.view(bad)["error"]  # that is for the log
    assert line.health()["state"] == "failing" and line.health()["failed"] == 1
    good = line.submit("good", 1)
    good.finished.result(20)
    assert good.png == b"good/1" and line.health()["state"] == "ready"


def test_the_end_finishes_what_is_drawn_and_tells_the_others(model):
    line = started(model)
    first = held(model, line)
    second = line.submit("second", 1)
    line.close()
    assert second.state == queue.STOPPED and "is stopping" in line.view(second)["error"]
    assert line.health()["state"] == "stopping" and not line.idle(0.01)
    with pytest.raises(queue.Closed):
        line.submit("third", 2)
    model.go.set()
    assert line.idle(20) and first.state == queue.DONE and first.png == b"first/0"
    assert line.untold() == 2
    # Where it takes too long, those who wait are told all the same, and a late end changes nothing.
    other = started(slow := Echo())
    late = held(slow, other)
    other.close()
    other.abandon()
    assert late.state == queue.STOPPED and "had to stop" in other.view(late)["error"]
    slow.go.set()
    assert other.idle(20) and late.state == queue.STOPPED and late.png == b""


def test_what_is_finished_is_kept_for_a_while(model, monkeypatch):
    line = started(model)
    tickets = [line.submit("x" * 100, n) for n in range(3)]
    for one in tickets:
        one.finished.result(20)
    assert line.idle(20) and all(line.find(one.id) for one in tickets)
    monkeypatch.setattr(queue, "KEPT_BYTES", 250)
    assert line.find(tickets[0].id) is None and line.find(tickets[1].id) and line.find(tickets[2].id)
    tickets[2].ended -= queue.KEPT_SECONDS + 1
    assert line.find(tickets[2].id) is None and line.find(tickets[1].id)
    assert line.submit("unkept", 0, keep=False).id not in line._kept


def test_times_are_told_from_those_of_batches_before(model, monkeypatch):
    """With batches of 4 taking 8 s and single ones 3 s: six wait, so four come together, and then one after another."""
    line = started(model)
    held(model, line)
    others = [line.submit(f"{n}", n) for n in range(6)]
    assert line.view(others[0])["left"] is None
    monkeypatch.setattr(line, "_seconds", {1: 3.0, 4: 8.0})
    now = line.view(others[0])["left"] - 8
    assert 1 < now <= 3
    later = [line.view(one)["left"] - now for one in others]
    assert later == pytest.approx([8, 8, 8, 8, 11, 14], abs=0.2)
    monkeypatch.setattr(line, "_seconds", {1: 3.0})
    assert line.view(others[3])["left"] == pytest.approx(now + 12, abs=0.3)
    model.go.set()
