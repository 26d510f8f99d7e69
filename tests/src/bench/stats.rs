//! Medians, quartiles and what is noise.

use serde::Serialize;

/// The quantile `q` (0 to 1) of some values, by nearest rank; 0 of none.
pub(crate) fn quantile(values: &[f64], q: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "an index of the values"
    )]
    let rank = (q * sorted.len() as f64).ceil() as usize;
    sorted
        .get(rank.saturating_sub(1))
        .copied()
        .unwrap_or_default()
}

/// The median of some values with its spread.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct Spread {
    /// The median.
    pub(crate) median: f64,
    /// The quartiles: a half of the values lie between.
    pub(crate) quartiles: [f64; 2],
    /// Where the true median is, with a probability of 95 %, by the sign test.
    pub(crate) confidence: [f64; 2],
    /// How many values.
    pub(crate) rounds: usize,
}

impl Spread {
    /// Of some values.
    pub(crate) fn of(values: &[f64]) -> Self {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let outer = outer_rank(sorted.len());
        let at = |index: usize| sorted.get(index).copied().unwrap_or_default();
        Self {
            median: median(&sorted),
            quartiles: [quantile(&sorted, 0.25), quantile(&sorted, 0.75)],
            confidence: [at(outer), at(sorted.len().saturating_sub(1 + outer))],
            rounds: sorted.len(),
        }
    }

    /// How far from 1 the true median of ratios may be.
    pub(crate) fn distance_from_one(&self) -> f64 {
        let [low, high] = self.confidence;
        (low - 1.0).abs().max((high - 1.0).abs())
    }

    /// What ratios mean if those that differ from 1 by no more than `noise` mean
    /// nothing.
    pub(crate) fn verdict(&self, noise: f64) -> Verdict {
        let [low, high] = self.confidence;
        if self.rounds < 6 {
            Verdict::TooFewRounds
        } else if low > 1.0 + noise || high < 1.0 - noise {
            Verdict::Differs
        } else {
            Verdict::None
        }
    }
}

/// Whether there is a difference.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Verdict {
    /// With a probability of 95 %, and greater than the noise.
    Differs,
    /// Not a greater one than the noise.
    None,
    /// Not enough values to be as sure.
    TooFewRounds,
}

impl Verdict {
    /// What to say beside the ratio.
    pub(crate) const fn remark(self) -> &'static str {
        match self {
            Self::Differs => "",
            Self::None => "none",
            Self::TooFewRounds => "too few rounds",
        }
    }
}

fn median(sorted: &[f64]) -> f64 {
    let middle = sorted.len() / 2;
    match sorted {
        [] => 0.0,
        _ if sorted.len().is_multiple_of(2) => (sorted[middle - 1] + sorted[middle]) / 2.0,
        _ => sorted[middle],
    }
}

/// How many of `n` values, from the least and from the greatest on, lie outside
/// of the 95 % confidence interval of the median: the most for which as few
/// heads or fewer, in `n` throws of a coin, have a probability of at most 2.5 %.
fn outer_rank(n: usize) -> usize {
    let mut outer = 0;
    // Of no heads; then of one more, and so on.
    let mut exactly = 0.5_f64.powi(i32::try_from(n).unwrap_or(i32::MAX));
    let mut at_most = exactly;
    while at_most <= 0.025 && outer < n / 2 {
        #[expect(clippy::cast_precision_loss, reason = "small numbers")]
        {
            exactly *= (n - outer) as f64 / (outer + 1) as f64;
        }
        at_most += exactly;
        outer += 1;
    }
    // `outer` heads are too probable already; one fewer is not.
    outer.saturating_sub(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_values() {
        let values = [4.0, 1.0, 3.0, 2.0];
        assert_eq!(
            [0.0, 0.25, 0.5, 0.99, 1.0].map(|q| quantile(&values, q)),
            [1.0, 1.0, 2.0, 4.0, 4.0]
        );
        assert_eq!(quantile(&[], 0.5), 0.0);
    }

    #[test]
    fn the_confidence_interval_is_the_sign_tests() {
        // From tables: for n values the interval is from the k-th to the
        // (n - k + 1)-th.
        for (n, k) in [(6, 1), (9, 2), (12, 3), (20, 6), (50, 18), (100, 40)] {
            assert_eq!(outer_rank(n), k - 1, "{n}");
        }
        // Too few values to be sure of anything.
        assert_eq!([0, 1, 5].map(outer_rank), [0, 0, 0]);
    }

    #[test]
    fn inside_the_noise_is_no_difference() {
        let spread = Spread::of(&[1.04, 1.05, 1.05, 1.05, 1.06, 1.05, 1.05]);
        assert_eq!(spread.median, 1.05);
        assert_eq!(spread.verdict(0.03), Verdict::Differs);
        assert_eq!(spread.verdict(0.05), Verdict::None);
        let wide = Spread::of(&[0.9, 1.3, 1.2, 0.8, 1.1, 1.15]);
        assert_eq!(wide.verdict(0.01), Verdict::None);
        assert_eq!(Spread::of(&[2.0; 5]).verdict(0.01), Verdict::TooFewRounds);
        assert!((wide.distance_from_one() - 0.3).abs() < 1e-9);
    }
}
