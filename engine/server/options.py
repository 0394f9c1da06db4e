"""The options of a server, beside those of its engine: the flags of `penstock serve` are made from these fields."""

import dataclasses
from dataclasses import dataclass

from penstock.engine.config import option
from penstock.scheduler.units import show_value

KEY_VARIABLE = "PENSTOCK_API_KEY"


@dataclass(frozen=True)
class ServeOptions:
    """Raises ValueError, naming the field, when a value cannot be meant."""

    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0 lets other machines in: set --api-key then")
    port: int = option(8000, "port to listen on; 0 takes a free one", type=int)
    served_model_name: str | None = option(
        None, "names by which clients ask for the model, with commas between them (default: as --model has it)"
    )
    generation_config: str = option(
        "auto",
        "auto takes defaults for sampling from the checkpoint's generation_config.json; none takes the API's own",
        ("auto", "none"),
    )
    api_key: str | None = option(None, f"key that clients must send (default: that of {KEY_VARIABLE}, else none)")
    metrics_without_key: bool = option(False, "let /metrics be read without the key")
    request_log: str | None = option(None, "file to which a JSON line is appended for each request; - prints them")
    max_num_queued_reqs: int = option(2048, "most sequences that wait for a row; further requests get a 503", type=int)
    max_queue_wait: float = option(
        300.0, "most seconds that a request may be predicted to wait for a row; beyond, it gets a 503", type=float
    )
    shutdown_timeout: float = option(
        30.0, "seconds that requests may still take when the server is told to end", type=float
    )

    def __post_init__(self):
        for name, low, high in (("port", 0, 65535), ("max_num_queued_reqs", 0, 2**31), ("shutdown_timeout", 0, 86400)):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"{name}={show_value(value)}: expected a number from {low} to {high}")
        if not 0 < self.max_queue_wait < float("inf"):
            raise ValueError(f"max_queue_wait={show_value(self.max_queue_wait)}: expected a positive number of seconds")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable() and self.api_key):
            raise ValueError("api_key: expected printable ASCII characters, one at least")
        if self.served_model_name is not None and not all(name.strip() for name in self.served_model_name.split(",")):
            raise ValueError(f"served_model_name={show_value(self.served_model_name)}: a name is empty")

    def names(self, model: str) -> list[str]:
        """The names by which the model is served."""
        return [name.strip() for name in (self.served_model_name or model).split(",")]


FIELDS = dataclasses.fields(ServeOptions)
