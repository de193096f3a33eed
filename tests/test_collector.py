import gc
import weakref

from megatron_riskpo.collector import lasting_imports, without_requested_collections


class Cycle:
    def __init__(self) -> None:
        self.me = self


def dropped() -> weakref.ref:
    return weakref.ref(Cycle())


def test_what_is_imported_is_not_looked_at_again():
    before = gc.get_freeze_count()
    try:
        with lasting_imports():
            assert not gc.isenabled()
            lasting = dropped()
        assert gc.isenabled()
        assert gc.get_freeze_count() > before
        later = dropped()
        gc.collect()
        assert lasting() is not None
        assert later() is None
    finally:
        gc.unfreeze()


def test_collection_waits_for_the_end_of_the_body():
    with without_requested_collections():
        garbage = dropped()
        assert gc.collect() == 0
        assert garbage() is not None
    gc.collect()
    assert garbage() is None
