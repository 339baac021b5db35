"""kill -9 of a harvest into an object store, and of one of two harvests that share a cache by claims: nothing committed
is lost, nothing torn is accepted, and whoever goes on ends with the same bytes and with nothing put aside."""

from stages import CLAIMED, STORE_URL, STORED
from strikes import strike

STEPS = 5  # of a commit, each struck at least once


def test_of_two_harvests_that_share_by_claims_the_other_makes_what_a_killed_one_was_at(n_kills, tally, tmp_path):
    strike(CLAIMED, {"kill -9 of one of two": max(4, n_kills // 10)}, tally, tmp_path)


def test_a_harvest_into_a_store_keeps_its_promises_whenever_it_is_killed(n_kills, tally, store_url, tmp_path):
    wanted = {
        "kill -9 at a random moment": max(4, n_kills // 15),
        "kill -9 at a random request to the store": max(4, n_kills // 15),
        "kill -9 between the steps of a commit to the store": max(STEPS, n_kills // 15),
        "kill -9 of one of two": max(3, n_kills // 20),
    }
    strike(STORED, wanted, tally, tmp_path, **{STORE_URL: store_url})
