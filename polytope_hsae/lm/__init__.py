"""Language models: what is loaded (`loading`), read and edited (`model`, `edits`, `steering`), and text as tokens."""

from .model import FINAL_HOOK as FINAL_HOOK
from .model import NO_HEAD as NO_HEAD
from .model import Edit as Edit
from .model import LanguageModel as LanguageModel
