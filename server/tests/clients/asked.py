"""What the tests of all clients ask, and what a model answers with a call."""

CHAT = [{"role": "user", "content": "Tell me a story."}]
WAIT = 'Wait. <|tool_call>call:weather{city:<|"|>Rome<|"|>}<tool_call|>'
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "description": "The weather in a city.", "parameters": PARAMETERS},
}
SHAPE = {
    "title": "Lamp",
    "description": "A lamp.",
    "type": "object",
    "properties": {"on": {"type": "boolean"}, "level": {"enum": [1, 2, 3]}},
    "required": ["on", "level"],
    "additionalProperties": False,
}


def check_shape(lamp):
    """Fail unless ``lamp`` is of ``SHAPE``."""
    assert set(lamp) == {"on", "level"}
    assert type(lamp["on"]) is bool
    assert lamp["level"] in (1, 2, 3)
