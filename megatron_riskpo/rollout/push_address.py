"""At which address of its machine the trainer's first rank listens for a push over the network."""

import contextlib
import ipaddress
import os
from collections.abc import Collection, Sequence
from urllib.parse import urlsplit

from megatron_riskpo.errors import RunError
from megatron_riskpo.resharding.transports.meeting import address_towards

_LOCAL = "127.0.0.1"


def address_of_rank(host: str) -> str:
    """This rank's, as the first rank sees it; the name of its machine, `host`, where that is not known."""
    with contextlib.suppress(RunError):
        address = address_towards(os.environ.get("MASTER_ADDR", _LOCAL))
        if not is_local(address):
            return address
    return host


def store_address(urls: Sequence[str], ranks: Collection[str]) -> str:
    """Where the trainer's first rank can be reached by servers at `urls` and by `ranks`, the addresses of those on
    other machines: the loopback address where nobody is elsewhere. Raises RunError where there is no way to a server;
    a rank's name that means nothing here is passed over."""
    found = [address_towards(urlsplit(url).hostname or "") for url in urls]
    for rank in sorted(ranks):
        with contextlib.suppress(RunError):
            found.append(address_towards(rank))
    return next((address for address in found if not is_local(address)), _LOCAL)


def is_local(address: str) -> bool:
    """Whether it leads nowhere but to this machine."""
    return ipaddress.ip_address(address.split("%")[0]).is_loopback
