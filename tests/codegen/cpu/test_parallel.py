"""Work is shared out once, its errors come back, and torch's own number of threads stays what it was."""

import os

import pytest
import torch

from sptc.codegen.cpu.parallel import share, worker_count


@pytest.fixture(params=[1, 3, 12])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def square_all(numbers):
    found = {}

    def work(items):
        for i in items:
            x = torch.ones(2, requires_grad=True) * i
            found[i] = (x * x)[0].item()

    share(numbers, work)
    return found


def test_every_item_once_and_threads_restored(threads):
    found = square_all(range(50))
    assert found == {i: float(i * i) for i in range(50)}
    assert torch.get_num_threads() == threads and worker_count() == min(threads, 8)


def test_workers_split_the_threads(threads):
    seen = []
    share(range(40), lambda items: seen.extend(torch.get_num_threads() for _ in items))
    assert set(seen) == {max(1, threads // worker_count())}


def test_errors_come_back(threads):
    def work(items):
        for i in items:
            if i == 7:
                raise KeyError("seven")

    with pytest.raises(KeyError, match="seven"):
        share(range(20), work)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_process_has_its_own_workers():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert len(square_all(range(5))) == 5
        child = os.fork()
        if child == 0:
            os._exit(0 if len(square_all(range(5))) == 5 else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        torch.set_num_threads(before)
