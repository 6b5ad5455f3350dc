"""From token ids to text: incremental decoding, stop strings, thinking and tool calls."""
