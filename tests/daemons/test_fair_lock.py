"""The lock that serves in the order of coming, taken by hand and by a guarded function."""

import threading

import pytest

from daemons.fair_lock import FairLock

WAIT_S = 10


def test_fair_lock_serves_waiters_in_order_and_is_free_in_the_end():
    lock, order = FairLock(), []
    assert lock.acquire() is False
    threads = []
    for number in range(8):
        thread = threading.Thread(
            target=lambda number=number: (lock.acquire(), order.append(number), lock.release())
        )
        thread.start()
        threads.append(thread)
        while lock.waiting_count <= number:
            pass
    assert lock.try_acquire() is False
    lock.release()
    for thread in threads:
        thread.join(WAIT_S)
    assert order == list(range(8))
    assert lock.try_acquire() is True


def test_a_guarded_function_waits_for_its_turn_and_lets_the_next_in():
    lock, order = FairLock(), []
    guarded = lock.guarding(order.append)
    lock.acquire()
    threads = []
    for number in range(8):
        thread = threading.Thread(target=guarded, args=(number,))
        thread.start()
        threads.append(thread)
        while lock.waiting_count <= number:
            pass
    assert order == []
    lock.release()
    for thread in threads:
        thread.join(WAIT_S)
    assert order == list(range(8))
    assert lock.try_acquire() is True


def test_a_guarded_function_is_alone_and_gives_what_it_gives():
    lock = FairLock()
    seen = []

    def doubled(number):
        seen.append(lock.try_acquire())
        return 2 * number

    assert lock.guarding(doubled)(21) == 42
    assert seen == [False]
    assert lock.try_acquire() is True


def test_a_guarded_function_that_raises_leaves_the_lock_free():
    lock = FairLock()
    with pytest.raises(ZeroDivisionError):
        lock.guarding(lambda number: number / 0)(1)
    assert lock.try_acquire() is True


def test_guarded_functions_of_many_threads_never_run_together():
    lock = FairLock()
    inside, worst = [], []

    def alone(number):
        inside.append(number)
        worst.append(len(inside))
        inside.remove(number)

    guarded = lock.guarding(alone)
    threads = [
        threading.Thread(target=lambda n=n: [guarded(n) for _ in range(3000)]) for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert len(worst) == 12_000
    assert max(worst) == 1
