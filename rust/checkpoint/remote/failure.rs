//! What a store said, as one sentence without anything that should be kept secret.

use super::location::{Location, Scheme};
use crate::{Error, Result};
use std::path::Path;

/// Why a request gave nothing. Kept, and told to all who wait for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Failure {
    /// The object is not the one that was opened.
    Changed(&'static str),
    /// There is no such object.
    Missing(String),
    /// Anything else: what was said, and what to do.
    Refused(String),
}

impl Failure {
    /// The error of reading the object at this address.
    pub(super) fn error(self, url: &Path) -> Error {
        match self {
            Self::Changed(what) => Error::InputChanged { path: url.to_owned(), what },
            Self::Missing(problem) => {
                Error::Remote { path: url.to_owned(), problem, missing: true }
            }
            Self::Refused(problem) => Error::remote(url, problem),
        }
    }

    /// What an error of the client's means for a request about this location.
    pub(super) fn of(error: &object_store::Error, location: &Location) -> Self {
        use object_store::Error as E;
        let text = error.to_string();
        let code = between(&text, "<Code>", "</Code>").filter(|code| is_word(code));
        // Lists fail without a kind.
        let status = between(&text, "status code: ", " ").unwrap_or_default();
        let said = |status: &str| code.map_or(status.to_owned(), |code| format!("{status} {code}"));
        let Location { host, scheme, .. } = location;
        if matches!(code, Some("NoSuchBucket" | "ContainerNotFound")) {
            return Self::Missing(format!(
                "there is no bucket {host} ({}); correct its name",
                said("404")
            ));
        }
        if text.contains("configured region")
            || matches!(code, Some("PermanentRedirect" | "AuthorizationHeaderMalformed"))
        {
            return Self::Refused(format!(
                "the bucket {host} lies in another region; set AWS_REGION to it"
            ));
        }
        if text.contains("non-partial response") || text.contains("Range request not supported") {
            return Self::Refused(
                "its server does not serve ranges (it answers a request for some bytes with all of them); use one that \
                 does, or download the files"
                    .to_owned(),
            );
        }
        let unknown = ["SignatureDoesNotMatch", "InvalidAccessKeyId", "ExpiredToken"];
        match error {
            E::NotFound { .. } => Self::Missing(NO_OBJECT.to_owned()),
            E::Precondition { .. } | E::NotModified { .. } => Self::Changed(OTHER_ETAG),
            E::InvalidPath { .. } => {
                Self::Refused("its path is none that an object can have; correct it".to_owned())
            }
            _ if status == "401" || code.is_some_and(|code| unknown.contains(&code)) => {
                Self::Refused(format!(
                    "the store does not accept the credentials ({}); {}",
                    said(status),
                    credentials(*scheme)
                ))
            }
            E::Unauthenticated { .. } => Self::Refused(format!(
                "the store does not accept the credentials (401); {}",
                credentials(*scheme)
            )),
            E::PermissionDenied { .. } => Self::Refused(refusal(*scheme, &said("403"))),
            _ if status == "403" => Self::Refused(refusal(*scheme, &said("403"))),
            _ => Self::Refused(format!(
                "the store does not answer as it should ({}); check the address and the connection, and try again",
                reason(error, &text, code)
            )),
        }
    }
}

fn refusal(scheme: Scheme, said: &str) -> String {
    format!("the store does not allow it ({said}); {}", permissions(scheme))
}

pub(super) const OTHER_ETAG: &str = "its ETag differs";
pub(super) const NO_OBJECT: &str =
    "the store has no such object (404); correct the address, or upload it";

/// What to do where a request is not allowed.
fn permissions(scheme: Scheme) -> &'static str {
    match scheme {
        Scheme::S3 => {
            "the credentials must allow s3:GetObject on the objects and s3:ListBucket on the bucket (without the latter, \
             what is missing is refused like this, too)"
        }
        Scheme::Gs => "the credentials must allow storage.objects.get and storage.objects.list",
        Scheme::Az => {
            "the credentials must allow to read and list blobs (Storage Blob Data Reader)"
        }
        Scheme::Http | Scheme::Https => {
            "give an address that needs no login, or download the files"
        }
    }
}

/// What to do where there are no credentials, or others are needed.
pub(super) fn credentials(scheme: Scheme) -> &'static str {
    match scheme {
        Scheme::S3 => {
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_SESSION_TOKEN), or AWS_SKIP_SIGNATURE=true for a \
             public bucket"
        }
        Scheme::Gs => {
            "set GOOGLE_APPLICATION_CREDENTIALS, or GOOGLE_SKIP_SIGNATURE=true for a public bucket"
        }
        Scheme::Az => {
            "set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, or AZURE_SKIP_SIGNATURE=true for a public \
             container"
        }
        Scheme::Http | Scheme::Https => {
            "give an address that needs no login, or download the files"
        }
    }
}

/// The status of an answer, or the innermost cause. Bodies and addresses are left out: they may quote keys.
fn reason(error: &object_store::Error, text: &str, code: Option<&str>) -> String {
    if let Some(status) = text.split_once("status code: ").map(|(_, rest)| rest) {
        let status = status.split([':', '\n']).next().unwrap_or_default().trim();
        return match code {
            Some(code) => format!("{status} {code}"),
            None => status.to_owned(),
        };
    }
    let mut cause: &(dyn std::error::Error + 'static) = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    let said = cause.to_string();
    let mut words: Vec<String> = Vec::new();
    for word in said.split_whitespace() {
        // An address is not told again, and none of its query.
        words.push(if word.contains("://") { "…".to_owned() } else { word.to_owned() });
    }
    without_environment(&words.join(" "))
}

/// The text without any value of a variable that holds credentials.
fn without_environment(text: &str) -> String {
    let mut text: String = text.chars().take(300).collect();
    for (name, value) in std::env::vars_os() {
        let (Some(name), Some(value)) = (name.to_str(), value.to_str()) else { continue };
        let of_a_store =
            ["AWS_", "GOOGLE_", "AZURE_"].iter().any(|prefix| name.starts_with(prefix));
        let secret = ["KEY", "SECRET", "TOKEN", "SAS", "PASSWORD", "CREDENTIAL"];
        if of_a_store && value.len() >= 4 && secret.iter().any(|part| name.contains(part)) {
            text = text.replace(value, "…");
        }
    }
    text
}

fn between<'a>(text: &'a str, start: &str, end: &str) -> Option<&'a str> {
    Some(text.split_once(start)?.1.split_once(end)?.0)
}

fn is_word(text: &str) -> bool {
    (1..=64).contains(&text.len()) && text.chars().all(|c| c.is_ascii_alphanumeric())
}

/// As [`Failure::of`], as this crate's error.
pub(super) fn told<T>(result: object_store::Result<T>, location: &Location) -> Result<T> {
    result.map_err(|error| Failure::of(&error, location).error(&location.url()))
}
