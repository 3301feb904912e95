"""Graph passes that make training faster and change no result, one a file, which says after which others it runs."""

from .attention import Attention
from .changes import Changes
from .gram import Gram
from .rotary import Rotary
from .scalars import Scalars
from .siblings import Siblings
from .sums import Sums
from .tidy import Tidy

__all__ = ["Gram", "Changes", "Attention", "Tidy", "Scalars", "Sums", "Siblings", "Rotary"]
