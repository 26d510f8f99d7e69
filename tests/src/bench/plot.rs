//! Plots of the ratios.

use std::path::Path as FilePath;

use anyhow::{Result, anyhow};
use plotters::{
    chart::ChartBuilder,
    element::{PathElement, Rectangle, Text},
    prelude::{IntoDrawingArea as _, SVGBackend},
    style::{BLACK, Color as _, RGBColor, WHITE},
};

use super::report::Measure;

/// A mode's colour, in the order of [`super::mode::Mode::ALL`].
const COLOURS: [RGBColor; 6] = [
    RGBColor(0x99, 0x99, 0x99),
    RGBColor(0xbb, 0xbb, 0xbb),
    RGBColor(0xd5, 0x5e, 0x00),
    RGBColor(0xe6, 0x9f, 0x00),
    RGBColor(0x00, 0x72, 0xb2),
    RGBColor(0x56, 0xb4, 0xe9),
];

/// Where the axis ends. Longer bars are cut off; the number says how long.
const MOST: f64 = 2.0;

/// Draws a path's measures: a group of bars for each, one per mode, with a line
/// between the quartiles, and the noise in grey.
pub(crate) fn draw(file: &FilePath, title: &str, measures: &[&Measure]) -> Result<()> {
    let failed = |error: &dyn std::fmt::Display| anyhow!("draw {}: {error}", file.display());
    let width = u32::try_from(measures.len())? * 150 + 120;
    let root = SVGBackend::new(file, (width, 420)).into_drawing_area();
    root.fill(&WHITE).map_err(|error| failed(&error))?;
    #[expect(clippy::cast_precision_loss, reason = "a few measures")]
    let groups = measures.len() as f64;
    let mut chart = ChartBuilder::on(&root)
        .caption(title, ("sans-serif", 18))
        .margin(10)
        .x_label_area_size(10)
        .y_label_area_size(50)
        .build_cartesian_2d(0.0..groups, 0.0..MOST * 1.12)
        .map_err(|error| failed(&error))?;
    chart
        .configure_mesh()
        .disable_mesh()
        .x_labels(0)
        .y_labels(8)
        .y_desc("ratio to direct")
        .draw()
        .map_err(|error| failed(&error))?;
    for (group, measure) in measures.iter().enumerate() {
        #[expect(clippy::cast_precision_loss, reason = "a few measures")]
        let left = group as f64;
        let noise = Rectangle::new(
            [
                (left, 1.0 - measure.noise),
                (left + 0.95, 1.0 + measure.noise),
            ],
            BLACK.mix(0.15).filled(),
        );
        chart.draw_series([noise]).map_err(|error| failed(&error))?;
        let label = Text::new(
            measure.measure.to_owned(),
            (left + 0.02, MOST * 1.1),
            ("sans-serif", 11),
        );
        chart.draw_series([label]).map_err(|error| failed(&error))?;
        #[expect(clippy::cast_precision_loss, reason = "a few modes")]
        let bar = 0.9 / measure.modes.len() as f64;
        for (index, (row, colour)) in measure.modes.iter().zip(COLOURS).enumerate() {
            #[expect(clippy::cast_precision_loss, reason = "a few modes")]
            let x = left + 0.02 + index as f64 * bar;
            let middle = x + bar * 0.45;
            let [low, high] = row.ratio.quartiles;
            let body = Rectangle::new(
                [(x, 0.0), (x + bar * 0.9, row.ratio.median.min(MOST))],
                colour.filled(),
            );
            let series = chart.draw_series([body]).map_err(|error| failed(&error))?;
            if group == 0 {
                series.label(row.mode.clone()).legend(move |(x, y)| {
                    Rectangle::new([(x, y - 4), (x + 10, y + 4)], colour.filled())
                });
            }
            let spread = [low, high].map(|ratio| (middle, ratio.min(MOST)));
            chart
                .draw_series([PathElement::new(spread, BLACK)])
                .map_err(|error| failed(&error))?;
            let number = Text::new(
                format!("{:.2}", row.ratio.median),
                (x, high.min(MOST) + 0.06),
                ("sans-serif", 10),
            );
            chart
                .draw_series([number])
                .map_err(|error| failed(&error))?;
        }
    }
    chart
        .configure_series_labels()
        .position(plotters::chart::SeriesLabelPosition::LowerRight)
        .background_style(WHITE.mix(0.8))
        .draw()
        .map_err(|error| failed(&error))?;
    root.present().map_err(|error| failed(&error))?;
    Ok(())
}
