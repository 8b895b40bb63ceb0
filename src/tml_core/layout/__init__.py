"""How turns are spelled as tokens: micro-turn layout v1 and the chat template, one code for all.

What goes in (chunk), what comes out (events), the two layouts (micro_turn, chat_template), text
and byte-level vocabularies (text), tool calls and declarations (tool_call), state between turns
(state), what is said aloud (sound).
"""

from tml_core.layout.chat_template import ChatLayout, ChatOutput, ChatState
from tml_core.layout.chunk import Chunk, ToolResult, as_chunk
from tml_core.layout.events import (
    AudioChunk,
    Event,
    Notice,
    Silence,
    TextToken,
    ToolCall,
    TurnDone,
)
from tml_core.layout.micro_turn import MicroTurnLayout
from tml_core.layout.output import MicroTurnState, OutputGrammar, TickOutput
from tml_core.layout.sound import SOUND, Voice
from tml_core.layout.state import EncodedInput, Layout, LayoutState, OutputHalf, Stream
from tml_core.layout.text import TextCodec
from tml_core.layout.tool_call import parse_call, tool_schema, tool_schemas

__all__ = [
    "SOUND",
    "AudioChunk",
    "ChatLayout",
    "ChatOutput",
    "ChatState",
    "Chunk",
    "EncodedInput",
    "Event",
    "Layout",
    "LayoutState",
    "MicroTurnLayout",
    "MicroTurnState",
    "Notice",
    "OutputGrammar",
    "OutputHalf",
    "Silence",
    "Stream",
    "TextCodec",
    "TextToken",
    "TickOutput",
    "ToolCall",
    "ToolResult",
    "TurnDone",
    "Voice",
    "as_chunk",
    "parse_call",
    "tool_schema",
    "tool_schemas",
]
