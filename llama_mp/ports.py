"""Whether the ranks can listen, and reach each other there, by plain connections: pair by pair, where gloo and NCCL
connect all with all, or fail without saying which."""

import fcntl
import os
import socket
import struct
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

SIOCGIFADDR = 0x8915  # netdevice(7)
MAX_AT_ONCE = 32


class Ear:
    """A port of this process at which it accepts whoever comes. Raises OSError when it cannot listen."""

    def __init__(self) -> None:
        self.host = own_address()
        self.socket = socket.create_server((self.host, 0), backlog=128)
        self.port: int = self.socket.getsockname()[1]
        threading.Thread(target=self.listen, daemon=True).start()

    def listen(self) -> None:
        while True:
            try:
                self.socket.accept()[0].close()
            except OSError:  # closed
                return

    def close(self) -> None:
        self.socket.shutdown(socket.SHUT_RDWR)  # else `accept` goes on
        self.socket.close()


def own_address() -> str:
    """Where gloo would listen: on the interface that GLOO_SOCKET_IFNAME names, else at what the host's name stands for,
    where that is this machine. Raises OSError for an interface that there is not."""
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    if interface:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                answer = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
            except OSError as error:
                raise OSError(f"no address on the interface {interface} of GLOO_SOCKET_IFNAME") from error
        return socket.inet_ntoa(answer[20:24])
    try:
        address = socket.gethostbyname(socket.gethostname())
        socket.create_server((address, 0)).close()
    except OSError:
        return "127.0.0.1"
    return address


def unreached(places: Sequence[tuple[str, int]], timeout_s: float) -> dict[int, str]:
    """Why each of `places` that does not take a connection does not, by its number. All are tried at once."""

    def reach(place: tuple[str, int]) -> str | None:
        try:
            socket.create_connection(place, timeout_s).close()
        except OSError as error:
            return error.strerror or str(error)
        return None

    with ThreadPoolExecutor(MAX_AT_ONCE) as pool:
        return {number: why for number, why in enumerate(pool.map(reach, map(tuple, places))) if why}
