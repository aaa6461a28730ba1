"""Work that threads do ahead, such as reading images."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice


def in_threads(function: Callable, items: Iterable, workers: int) -> Iterator:
    """function(item) for every item, in order, computed a little ahead by `workers` threads."""
    items = iter(items)
    with ThreadPoolExecutor(max(workers, 1)) as pool:
        try:
            waiting = deque(pool.submit(function, i) for i in islice(items, 2 * max(workers, 1)))
            while waiting:
                yield waiting.popleft().result()
                waiting.extend(pool.submit(function, i) for i in islice(items, 1))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
