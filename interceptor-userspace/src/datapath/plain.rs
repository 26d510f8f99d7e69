//! The map types of `interceptor-common`, as aya wants them.

/// A value of a BPF map.
#[derive(Clone, Copy, Debug)]
#[repr(transparent)]
pub(crate) struct Plain<T>(pub(crate) T);

// SAFETY: `Plain<T>` is laid out as `T`, and bytemuck's `Pod` promises more of
// it than aya's: no padding, and no invalid values.
unsafe impl<T: bytemuck::Pod> aya::Pod for Plain<T> {}
