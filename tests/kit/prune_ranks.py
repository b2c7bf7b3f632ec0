"""Ranks in threads, which sum as processes do."""

import threading

import torch


class Ranks:
    """Runs a function on threads that sum tensors as ranks do; one that calls another number of times is an error."""

    def __init__(self, number):
        self.barrier = threading.Barrier(number, timeout=20)
        self.given = [None] * number

    def reduce(self, rank):
        def sums(tensor):
            self.given[rank] = tensor.clone()
            self.barrier.wait()
            assert len({(one.shape, one.dtype) for one in self.given}) == 1
            total = sum(self.given[1:], self.given[0].clone())
            self.barrier.wait()
            return tensor.copy_(total)

        return sums

    def run(self, function):
        results, errors = {}, {}

        def target(rank):
            try:
                results[rank] = function(rank, self.reduce(rank))
            except Exception as error:
                errors[rank] = error
                self.barrier.abort()

        threads = [threading.Thread(target=target, args=(rank,)) for rank in range(len(self.given))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        torch.compiler.set_stance("default")  # of all threads; each has put back what it found, in any order
        if errors:
            raise next((e for e in errors.values() if not isinstance(e, threading.BrokenBarrierError)), errors[min(errors)])
        return [results[rank] for rank in sorted(results)]
