"""A microphone gives blocks of whatever size it likes: `micro_turns` cuts them to 200 ms.

The microphone here is a thread that plays a recording at 44.1 kHz in blocks of odd sizes; a real
one would put what its callback gets into the same queue. Run it: ``python examples/microphone.py``.
"""

import queue
import random
import threading
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

import tml_core as tml

RATE = 44_100
SECONDS = 3.0

Block = NDArray[np.float32]


def microphone(blocks: "queue.Queue[Block | None]") -> None:
    """Put blocks of 1 to 4000 samples into ``blocks``, then None."""
    audio, _ = tml.media.clips()
    sound = tml.media.read_audio(audio, RATE)[: int(SECONDS * RATE)]
    sizes = random.Random(1)
    start = 0
    while start < len(sound):
        stop = start + sizes.randint(1, 4000)
        blocks.put(sound[start:stop])
        start = stop
    blocks.put(None)


def heard(blocks: "queue.Queue[Block | None]") -> Iterator[Block]:
    """The blocks as they come, until the microphone is switched off."""
    while (block := blocks.get()) is not None:
        yield block


def main() -> None:
    blocks: queue.Queue[Block | None] = queue.Queue(maxsize=64)
    threading.Thread(target=microphone, args=(blocks,), daemon=True).start()
    with tml.Session("nano", seed=1) as session:
        for chunk in tml.media.micro_turns(heard(blocks), sample_rate=RATE):
            result = session.append(chunk).result()
            said = "silence" if result.done.reason == "silence" else repr(result.text)
            print(f"{chunk.start_ms / 1000:4.1f} s  {said}  {result.stats.total_ms:.0f} ms")
            for event in result.events:
                if isinstance(event, tml.Notice):
                    print(f"        {event.message}")


if __name__ == "__main__":
    main()
