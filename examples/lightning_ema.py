"""Lightning: it calls step with a closure and clips inside it; a callback validates on the moving average.

Run it: python examples/lightning_ema.py
"""

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fuseopt
from fuseopt.integrations.lightning import EvaluateAverage


class Classifier(L.LightningModule):
    def __init__(self, optimizer_class=fuseopt.AdamW, **options):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Dropout(0.1), nn.Linear(64, 4))
        self.optimizer_class, self.options, self.losses = optimizer_class, options, []

    def loss(self, batch):
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def training_step(self, batch, _):
        loss = self.loss(batch)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch, _):
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self):
        optimizer = self.optimizer_class(self.parameters(), lr=1e-2, weight_decay=0.1, **self.options)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4)]


def loader(number, seed, **options):
    """Random points; the label is the nearest of four directions."""
    directions = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
    points = torch.randn(number, 16, generator=torch.Generator().manual_seed(seed))
    return DataLoader(TensorDataset(points, (points @ directions).argmax(1)), batch_size=16, **options)


def train(model_class=Classifier, optimizer_class=fuseopt.AdamW, callbacks=(), trainer=L.Trainer, **options):
    """(model, trainer) after the run."""
    L.seed_everything(0, verbose=False)
    model = model_class(optimizer_class, **options)
    trainer = trainer(
        max_epochs=4, gradient_clip_val=1.0, accelerator="cpu", callbacks=list(callbacks), logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, loader(128, 2, shuffle=True), loader(64, 3))
    return model, trainer


if __name__ == "__main__":
    model, trainer = train(callbacks=[EvaluateAverage()], ema=fuseopt.EMA(0.9))
    losses = model.losses
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, of the average {float(trainer.callback_metrics['val_loss']):.3f}")
