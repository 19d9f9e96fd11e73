"""Models to fine-tune: small ones of our own, any transformers classifier, their heads, and LoRA.

small.py       cnn, rnn and mlp
start.py       the options, and the model that they ask for
source.py      which configuration and which weights: a folder, a file, the hub, the embedded network
weights.py     reading them, and whether they fit
heads.py       for which classes, and how new layers begin
processors.py  the tokenizer or the normalisation that belongs to them
lora.py        LoRA through peft
saving.py      a folder that from_pretrained reads

digits_0_4/ is the model/ of this command, to the bit:

    fuseopt finetune --classes 0 1 2 3 4 --pretrained none --optimizer torch-adamw --num_train_epochs 30 \\
        --learning_rate 2e-3 --weight_decay 0.01
"""

from fuseopt.finetune.models.saving import save
from fuseopt.finetune.models.small import SMALL
from fuseopt.finetune.models.source import EMBEDDED
from fuseopt.finetune.models.start import ModelOptions, Start, start

__all__ = ["EMBEDDED", "SMALL", "ModelOptions", "Start", "save", "start"]
