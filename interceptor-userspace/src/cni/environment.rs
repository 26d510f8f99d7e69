//! What a container runtime says in the environment: which operation, on which
//! container, interface and network namespace.

use std::{ffi::OsString, path::PathBuf};

use rscni_types::{
    error::Error,
    types::{
        CNI_ARGS, CNI_COMMAND, CNI_CONTAINERID, CNI_IFNAME, CNI_NETNS, Cmd, ContainerId,
        InterfaceName,
    },
};

use crate::api::{CniAttachment, CniPod};

/// The variables, looked up by name.
pub(super) struct Environment<F>(pub F);

impl<F: Fn(&str) -> Option<OsString>> Environment<F> {
    /// `CNI_COMMAND`.
    pub(super) fn command(&self) -> Result<Cmd, Error> {
        match self.text(CNI_COMMAND)? {
            Some(command) => command.parse(),
            None => Err(Error::InvalidEnvValue(format!(
                "{CNI_COMMAND} is not set: this program is a CNI plugin, which a container runtime \
                 calls; `interceptor cni-install` adds it to a node's network configuration"
            ))),
        }
    }

    /// `CNI_CONTAINERID` and `CNI_IFNAME`.
    pub(super) fn attachment(&self) -> Result<CniAttachment, Error> {
        Ok(CniAttachment {
            container_id: ContainerId::try_from(self.needed(CNI_CONTAINERID)?)?.to_string(),
            interface: InterfaceName::try_from(self.needed(CNI_IFNAME)?)?.to_string(),
        })
    }

    /// All of them: those of the attachment, `CNI_NETNS`, and the pod's names in
    /// `CNI_ARGS`. The annotations are none of the environment's.
    pub(super) fn pod(&self) -> Result<CniPod, Error> {
        let args = self.text(CNI_ARGS)?.unwrap_or_default();
        let [namespace, name, uid] = pod_names(&args)?;
        Ok(CniPod {
            attachment: self.attachment()?,
            netns: PathBuf::from(self.needed(CNI_NETNS)?),
            namespace,
            name,
            uid,
            annotations: None,
            args,
        })
    }

    fn needed(&self, name: &str) -> Result<String, Error> {
        self.text(name)?
            .ok_or_else(|| Error::InvalidEnvValue(format!("{name} is not set")))
    }

    /// A variable that is set to more than nothing.
    fn text(&self, name: &str) -> Result<Option<String>, Error> {
        self.0(name)
            .filter(|value| !value.is_empty())
            .map(OsString::into_string)
            .transpose()
            .map_err(|value| Error::InvalidEnvValue(format!("{name} is no UTF-8: {value:?}")))
    }
}

/// `K8S_POD_NAMESPACE`, `K8S_POD_NAME` and `K8S_POD_UID` of `CNI_ARGS`, which is
/// `KEY=VALUE;KEY=VALUE`.
fn pod_names(args: &str) -> Result<[Option<String>; 3], Error> {
    let mut names = [const { None }; 3];
    for pair in args.split(';').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once('=').ok_or_else(|| {
            Error::InvalidEnvValue(format!(
                "{CNI_ARGS} has `{pair}`, which is no KEY=VALUE, in `{args}`"
            ))
        })?;
        let place = match key {
            "K8S_POD_NAMESPACE" => 0,
            "K8S_POD_NAME" => 1,
            "K8S_POD_UID" => 2,
            _ => continue,
        };
        names[place] = Some(value.to_owned()).filter(|value| !value.is_empty());
    }
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pods_names_are_found_among_other_arguments() {
        let some = |text: &str| Some(text.to_owned());
        assert_eq!(
            pod_names(
                "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0;K8S_POD_UID=8f-2c"
            )
            .unwrap(),
            [some("shop"), some("web-0"), some("8f-2c")]
        );
        assert_eq!(
            pod_names("IgnoreUnknown=1;K8S_POD_NAME=web;").unwrap(),
            [None, some("web"), None]
        );
        assert_eq!(pod_names("").unwrap(), [None, None, None]);
        assert_eq!(pod_names("K8S_POD_NAME=").unwrap(), [None, None, None]);
        let error = pod_names("K8S_POD_NAME").unwrap_err();
        assert!(error.details().contains("KEY=VALUE"), "{error:?}");
    }
}
