"""A LangChain chat model that polydraft runs, in this process."""

from langchain_polydraft.chat_models import ChatPolydraft
from langchain_polydraft.sessions import close_sessions

__all__ = ["ChatPolydraft", "close_sessions"]
